"""Tables that compare measurements with the plan's predictions."""

from rich.table import Table

from fiddler_run.plan.parts import PARTS
from fiddler_run.plan.schema import Plan


def figures(plan: Plan, measured) -> Table:
    """The measurements, and the plan's predictions for its own workload."""
    predicted = plan.predicted
    workload = plan.workload
    table = Table(
        title=f"{measured.prompt_tokens} prompt + {measured.output_tokens} output tokens",
        title_justify="left",
    )
    for column in ("", "measured", f"plan ({workload.prompt_tokens} + {workload.output_tokens})"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("time to first token", f"{measured.ttft_s:.3f} s", f"{predicted.ttft_s:.3f} s")
    table.add_row(
        "decode",
        f"{measured.decode_tokens_per_s:.2f} tokens/s",
        f"{predicted.decode_tokens_per_s:.2f} tokens/s",
    )
    if 0 < measured.passes < measured.output_tokens - 1:
        each = (measured.output_tokens - 1) / measured.passes
        table.add_row("tokens per pass, by lookup", f"{each:.2f}", "")
    traffic = measured.traffic if measured.output_tokens > 1 else measured.prefill_traffic
    table.add_row("GPU hit rate", f"{traffic.hit_rate:.1%}", f"{predicted.gpu_hit_rate:.1%}")
    if measured.peak_gpu_bytes:
        allowed = plan.rank.gpu_memory_bytes.total - plan.rank.gpu_memory_bytes.reserve
        table.add_row(
            "GPU memory, peak", f"{measured.peak_gpu_bytes / 1e9:.2f} GB", f"{allowed / 1e9:.2f} GB"
        )
    return table


def parts(plan: Plan, result) -> Table:
    """The parts of a decode step's time and of the time to first token, measured and predicted."""
    predicted = plan.predicted
    device = plan.rank.device
    columns = (
        result.decode.ms,
        seen(predicted.decode_ms, device),
        result.prefill.ms,
        seen(predicted.ttft_ms, device),
    )
    table = Table(
        title="milliseconds by part, in a separate run with a timeline", title_justify="left"
    )
    for column in ("", "decode step", "plan", "first token", "plan"):
        table.add_column(column, justify="left" if not column else "right")
    several = len(plan.ranks) > 1
    labels = PARTS | {"exchange": "exchange between ranks, waits for others"}
    exchange = ("exchange",) if several else ()
    rows = {
        labels[part]: [column.get(part, 0.0) for column in columns]
        for part in ("host", "resident", *exchange, "dense", "head")
    }
    rows["total"] = [sum(column.values()) for column in columns]
    idle = [phase.at_work_ms.get("idle", 0.0) for phase in (result.decode, result.prefill)]
    rows["idle"] = [idle[0], 0.0, idle[1], 0.0]
    for name, cells in rows.items():
        table.add_row(name, *(f"{cell:.2f}" if cell else "" for cell in cells))
    lines = [
        "of overlapping parts, only the first counts; the plan's columns are for its own workload"
    ]
    if several:
        lines.append("measured in rank 0, predicted for the slowest rank of each layer")
    if several and device == "cuda":
        lines.append("with a timeline, ranks launch their experts without CUDA graphs")
    table.caption = "\n".join(lines)
    return table


def seen(predicted_ms: dict[str, float], device: str) -> dict[str, float]:
    """The plan's parts of a time, merged into those that a timeline distinguishes.

    Without a GPU, all blocks count as host blocks.
    """
    host = ("host", "disk") if device == "cuda" else ("host", "disk", "resident")
    groups = {
        "host": host,
        "resident": ("resident",) if device == "cuda" else (),
        "exchange": ("exchange",),
        "dense": ("dense", "launch_overhead"),
        "head": ("head",),
    }
    return {name: sum(predicted_ms.get(part, 0.0) for part in of) for name, of in groups.items()}


def rates(plan: Plan, result) -> Table:
    """The rate of each resource during decode, compared with the profile and with plain loops."""
    profile = plan.bytes_per_s
    profiled = {
        "resident": profile.resident,
        "link": profile.link,
        "CPU": profile.cpu,
        "host": profile.host,
    }
    table = Table(title="expert bytes in decode", title_justify="left")
    for column in ("", "busy, ms per step", "rate", "profile", "only read or copied"):
        table.add_column(column, justify="left" if not column else "right")

    def rate(of: dict, name: str) -> str:
        return f"{of[name] / 1e9:.1f} GB/s" if of.get(name) else ""

    for rank, decode in enumerate([result.decode, *result.other_ranks]):
        # the profile's rates and those of plain loops are of rank 0
        compared = (profiled, result.bare_bytes_per_s) if rank == 0 else ({}, {})
        prefix = f"rank {rank}: " if result.other_ranks else ""
        for name in decode.bytes_per_s:
            at_work = {**decode.ms, **decode.at_work_ms}.get(name)
            table.add_row(
                prefix + {"host": "CPU and link"}.get(name, name),
                "" if at_work is None else f"{at_work:.2f}",
                *(rate(of, name) for of in (decode.bytes_per_s, *compared)),
            )
    memory = "in rank 0, " if result.other_ranks else ""
    memory += f"peak RAM: {result.peak_host_bytes / 1e9:.2f} GB"
    if result.used_gpu_bytes:
        memory += f"; GPU memory used by all processes: {result.used_gpu_bytes / 1e9:.2f} GB"
    lines = [memory]
    if result.stream_share:
        found = result.stream_share.values()
        mean = sum(found) / len(found)
        planned = plan.rank.stream_share_at(1)
        lines.append(
            f"tuned stream share for one token: {mean:.0%}, by layer {min(found):.0%} to"
            f" {max(found):.0%} (plan: {planned:.0%})"
        )
    if result.prefill_odds != 1:
        lines.append(
            f"tuned odds, streamed : CPU, for long prompts: {result.prefill_odds:.2f} times the"
            " plan's"
        )
    table.caption = "\n".join(lines)
    return table
