"""Tables of what was measured, beside what the plan predicts."""

from rich.table import Table

from fiddler_run.plan import Plan


def figures(plan: Plan, measured) -> Table:
    """What was measured beside what the plan predicts for its own workload."""
    predicted, workload = plan.predicted, plan.workload
    table = Table(title=f"{measured.prompt_tokens} prompt + {measured.output_tokens} output tokens", title_justify="left")
    for column in ("", "measured", f"plan ({workload.prompt_tokens} + {workload.output_tokens})"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("time to first token", f"{measured.ttft_s:.3f} s", f"{predicted.ttft_s:.3f} s")
    table.add_row("decode", f"{measured.decode_tokens_per_s:.2f} tokens/s", f"{predicted.decode_tokens_per_s:.2f} tokens/s")
    table.add_row("GPU hit rate", f"{measured.traffic.hit_rate:.1%}", f"{predicted.gpu_hit_rate:.1%}")
    if measured.peak_gpu_bytes:
        allowed = plan.gpu_memory_bytes.total - plan.gpu_memory_bytes.reserve
        table.add_row("GPU memory, peak", f"{measured.peak_gpu_bytes / 1e9:.2f} GB", f"{allowed / 1e9:.2f} GB")
    return table


def parts(plan: Plan, result) -> Table:
    """What a layer's time in decode goes into; rates of the executors, beside the profile's and what plain loops reach here."""
    rates = plan.bytes_per_s
    profiled = {"resident": rates.resident, "link": rates.link, "CPU": rates.cpu, "absent": rates.absent}
    table = Table(title="a layer in decode", title_justify="left")
    for column in ("", "at work", "rate", "profile", "bare loop"):
        table.add_column(column, justify="left" if not column else "right")

    def rate(of: dict, name: str) -> str:
        return f"{of[name] / 1e9:.1f} GB/s" if of.get(name) else ""

    for name in dict.fromkeys([*result.layer_ms, *result.bytes_per_s]):
        milliseconds = result.layer_ms.get(name)
        table.add_row(
            {"absent": "CPU and link", "waiting": "none of these"}.get(name, name),
            "" if milliseconds is None else f"{milliseconds:.3f} ms",
            *(rate(of, name) for of in (result.bytes_per_s, profiled, result.bare_bytes_per_s)),
        )
    memory = f"{result.peak_host_bytes / 1e9:.2f} GB of RAM at most"
    if result.used_gpu_bytes:
        memory += f"; {result.used_gpu_bytes / 1e9:.2f} GB of GPU memory in use by all processes"
    table.caption = memory
    return table
