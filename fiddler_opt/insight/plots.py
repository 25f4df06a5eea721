"""Plots profiles, plans and what-ifs.

This module and `replay_report` are the only ones that need matplotlib.
"""

import io
from pathlib import Path

from fiddler_opt.inputs.machine import MachineProfile
from fiddler_opt.inputs.routing_profile import RoutingProfile
from fiddler_opt.insight.routing_report import merged_activations
from fiddler_opt.insight.sweep import Row
from fiddler_opt.insight.sweep_flags import Quantity
from fiddler_opt.units import format_bytes
from fiddler_run.errors import FiddlerError
from fiddler_run.plan.schema import Plan
from fiddler_run.system.files import cannot_write, write_whole


def plot(shown: Plan | MachineProfile | RoutingProfile, path: str | Path) -> None:
    """Writes a plot in the format given by the file's suffix.

    Raises:
        FiddlerError: matplotlib is not installed or does not support the format, or the file cannot
            be written.
    """
    require_matplotlib()
    figure = {Plan: _plan, MachineProfile: _machine, RoutingProfile: _routing}[type(shown)](shown)
    save(figure, path)


def plot_curves(
    rows: list[Row], quantity: Quantity, profiled: float | None, title: str, path: str | Path
) -> None:
    """Plots a what-if: tokens/s on the left, time to first token on the right.

    Args:
        profiled: the machine's own value, marked if it lies within the range.

    Raises:
        FiddlerError: as for `plot`.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    per, label = quantity.axis(rows[-1].point.value)
    values = [row.point.value / per for row in rows]
    found = [
        (value, row.plan.predicted) for value, row in zip(values, rows, strict=True) if row.plan
    ]
    missing = [value for value, row in zip(values, rows, strict=True) if row.plan is None]
    curves = {
        "decode, tokens/s": [predicted.decode_tokens_per_s for _, predicted in found],
        "time to first token, s": [predicted.ttft_s for _, predicted in found],
    }
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    for axes, (name, heights), color in zip(
        figure.subplots(1, 2), curves.items(), ("C0", "C1"), strict=True
    ):
        axes.plot([value for value, _ in found], heights, marker="o", color=color)
        if profiled is not None and values[0] <= profiled / per <= values[-1]:
            axes.axvline(
                profiled / per, color="gray", linestyle="--", linewidth=1, label="as profiled"
            )
        if missing:
            axes.plot(
                missing,
                [0] * len(missing),
                linestyle="",
                marker="x",
                color="C3",
                clip_on=False,
                label="no plan",
            )
        axes.set(xlabel=label, ylabel=name, ylim=(0, 1.1 * max(heights)))
        ticks = [f"{value:g}" for value in values]
        axes.set_xticks(values, ticks, rotation=45 if sum(map(len, ticks)) > 40 else 0)
        axes.grid(alpha=0.3)
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(title, fontsize="medium", wrap=True)
    save(figure, path)


def require_matplotlib() -> None:
    """Checks that plots can be drawn, without a display.

    Raises:
        FiddlerError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise FiddlerError("--plot needs matplotlib; pip install matplotlib") from None
    matplotlib.use("Agg")


def save(figure, path: str | Path) -> None:
    """Writes a figure in the format given by the file's suffix. Raises as `plot`."""
    picture = io.BytesIO()
    try:
        figure.savefig(picture, dpi=150, format=Path(path).suffix.removeprefix(".") or "png")
    except ValueError as error:  # unsupported format
        raise cannot_write(path, error) from None
    write_whole(path, picture.getvalue())


def _plan(plan: Plan):
    rows = plan.resident_rows()
    title = f"{plan.model.name}: blocks in GPU memory, of {plan.blocks_per_expert} an expert"
    return _heat_map(rows, title, "blocks", plan.blocks_per_expert)


def _routing(routing: RoutingProfile):
    """Plots prefill over all sets of prompts, and decode if tokens were generated."""
    from matplotlib.figure import Figure

    phases = {}
    for phase in ("prefill", "decode"):
        tokens = sum(getattr(part, phase).tokens for part in routing.sets.values())
        if tokens:
            phases[f"{phase} ({tokens} tokens)"] = [
                [count / tokens for count in row] for row in merged_activations(routing, phase)
            ]
    most = max(max(row) for rows in phases.values() for row in rows)
    experts = routing.model.num_experts
    layers = routing.model.num_layers
    size = len(phases) * max(4.0, 1.5 + 0.4 * experts) + 1, max(3.2, 1.7 + 0.17 * layers)
    figure = Figure(figsize=size, layout="constrained")
    for axes, (title, rows) in zip(
        figure.subplots(1, len(phases), squeeze=False)[0], phases.items(), strict=True
    ):
        image = _draw_rows(axes, rows, most)
        axes.set_title(title, fontsize="medium")
    figure.colorbar(image, label="fraction of tokens")
    figure.suptitle(f"{routing.model.name}: how often a token chooses an expert", fontsize="medium")
    return figure


def _heat_map(rows: list[list[float]], title: str, unit: str, most: float):
    """Plots layers downwards and experts across. White is zero."""
    from matplotlib.figure import Figure

    figure = Figure(
        figsize=(max(5.0, 2.5 + 0.4 * len(rows[0])), max(3.0, 1.5 + 0.17 * len(rows))),
        layout="constrained",
    )
    axes = figure.subplots()
    image = _draw_rows(axes, rows, most)
    axes.set_title(title, fontsize="medium", wrap=True)
    figure.colorbar(image, label=unit)
    return figure


def _draw_rows(axes, rows: list[list[float]], most: float):
    image = axes.imshow(
        rows, cmap="Blues", vmin=0, vmax=most, aspect="auto", interpolation="nearest"
    )
    axes.set(xlabel="expert", ylabel="layer", xticks=_ticks(len(rows[0])), yticks=_ticks(len(rows)))
    return image


def _ticks(count: int) -> range:
    return range(0, count, max(1, -(-count // 16)))


def _machine(machine: MachineProfile):
    """Plots the time of one expert over tokens and, with a GPU, its rate over the stream share."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = Figure(figsize=(11 if machine.streams else 6, 4.5), layout="constrained")
    times, *rates = figure.subplots(1, 2) if machine.streams else [figure.subplots()]
    lines = {"CPU alone": machine.cpu_expert_us}
    if machine.streams:
        lines |= {
            "link alone": machine.link_expert_us,
            "CPU and link together": machine.best_host_us,
        }
    if machine.device.kind == "cuda":
        lines["GPU"] = machine.resident_expert_us
    for name, by_tokens in lines.items():
        times.plot(
            list(by_tokens),
            [us / 1e3 for us in by_tokens.values()],
            marker="o",
            markersize=4,
            label=name,
        )
    times.set(xscale="log", yscale="log", xlabel="tokens of the expert", ylabel="milliseconds")
    times.set_xscale("log", base=2)
    times.xaxis.set_major_formatter("{x:g}")
    times.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    times.yaxis.set_major_formatter("{x:g}")
    times.yaxis.set_minor_formatter(NullFormatter())
    times.set_title(f"one expert, {format_bytes(machine.shape.expert_bytes)}", fontsize="medium")
    times.legend()
    for axes in rates:
        _draw_shares(axes, machine)
    pinned = ", pinned" if machine.cpu.pinned else ""
    title = f"{machine.cpu.name}, {machine.cpu.threads} threads{pinned}; {machine.device.name}"
    figure.suptitle(title, fontsize="medium")
    return figure


def _draw_shares(axes, machine: MachineProfile) -> None:
    """Plots one line per token count with its best share marked, every second one if there are
    many.
    """
    counts = [tokens for tokens, by_share in machine.host_expert_us.items() if len(by_share) > 2]
    for tokens in counts[:: 2 if len(counts) > 6 else 1]:
        by_share = machine.host_expert_us[tokens]
        rates = {
            100 * share: machine.shape.expert_bytes / by_share[share] / 1e3
            for share in sorted(by_share)
        }
        (line,) = axes.plot(list(rates), list(rates.values()), marker=".", label=f"{tokens}")
        best = max(rates, key=rates.get)
        axes.plot([best], [rates[best]], marker="o", color=line.get_color())
    axes.set(
        xlim=(-2, 102),
        ylim=(0, None),
        xlabel="% streamed over the link; the CPU computes the rest",
        ylabel="GB/s",
    )
    axes.set_title(
        ("one expert in host memory, by tokens; dots mark the best share"), fontsize="medium"
    )
    axes.legend(title="tokens")
