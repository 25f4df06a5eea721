"""Pictures of profiles and plans. The only module that needs matplotlib, which comes with the extra `plots`."""

from pathlib import Path

from fiddler_opt.machine import MachineProfile
from fiddler_opt.routing import RoutingProfile
from fiddler_opt.units import format_bytes
from fiddler_run.errors import FiddlerError
from fiddler_run.plan import Plan


def plot(shown: Plan | MachineProfile | RoutingProfile, path: str | Path) -> None:
    """Writes a picture, in the format that the file's ending names.

    Raises:
        FiddlerError: matplotlib is not installed, knows no such format, or cannot write there.
    """
    try:
        import matplotlib
    except ImportError:
        raise FiddlerError("--plot needs matplotlib; pip install matplotlib") from None
    matplotlib.use("Agg")
    figure = {Plan: _plan, MachineProfile: _machine, RoutingProfile: _routing}[type(shown)](shown)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise FiddlerError(f"{path}: cannot write: {str(error).splitlines()[0]}") from None


def _plan(plan: Plan):
    rows = [plan.resident_blocks[layer] for layer in range(plan.model.num_layers)]
    title = f"{plan.model.name}: blocks in GPU memory, of {plan.blocks_per_expert} an expert"
    return _heat_map(rows, title, "blocks", plan.blocks_per_expert)


def _routing(routing: RoutingProfile):
    tokens = routing.recorded.tokens
    rows = [[count / tokens for count in routing.activations[layer]] for layer in range(routing.model.num_layers)]
    title = f"{routing.model.name}: how often a token chooses an expert ({tokens} tokens)"
    return _heat_map(rows, title, "part of the tokens", max(map(max, rows)))


def _heat_map(rows: list[list[float]], title: str, unit: str, most: float):
    """Layers down, experts across; white is none."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(5.0, 2.5 + 0.4 * len(rows[0])), max(3.0, 1.5 + 0.17 * len(rows))), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(rows, cmap="Blues", vmin=0, vmax=most, aspect="auto", interpolation="nearest")
    axes.set(xlabel="expert", ylabel="layer", xticks=_ticks(len(rows[0])), yticks=_ticks(len(rows)))
    axes.set_title(title, fontsize="medium", wrap=True)
    figure.colorbar(image, label=unit)
    return figure


def _ticks(count: int) -> range:
    return range(0, count, max(1, -(-count // 16)))


def _machine(machine: MachineProfile):
    """Left: time of one expert over tokens. Right, with a GPU: the share of an absent expert sent over the link."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    gpu = machine.device.kind == "cuda"
    figure = Figure(figsize=(10 if gpu else 6, 4.5), layout="constrained")
    times, *share = figure.subplots(1, 2) if gpu else [figure.subplots()]
    lines = {"CPU alone": machine.cpu_expert_us}
    if gpu:
        lines |= {"CPU and link together": machine.absent_expert_us, "GPU": machine.device_expert_us}
    for name, by_tokens in lines.items():
        times.plot(list(by_tokens), [us / 1e3 for us in by_tokens.values()], marker="o", label=name)
    times.set(yscale="log", ylabel="milliseconds")
    times.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    times.yaxis.set_major_formatter("{x:g}")
    times.yaxis.set_minor_formatter(NullFormatter())
    times.set_title(f"one expert, {format_bytes(machine.shape.expert_bytes)}", fontsize="medium")
    times.legend()
    for axes in share:
        axes.plot(list(machine.stream_share), [100 * part for part in machine.stream_share.values()], marker="o")
        axes.set(ylim=(0, 100), ylabel="%")
        axes.set_title("of an absent expert, best sent over the link", fontsize="medium")
    for axes in (times, *share):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("tokens of the expert")
    figure.suptitle(f"{machine.cpu.name}, {machine.cpu.threads} threads; {machine.device.name}", fontsize="medium")
    return figure
