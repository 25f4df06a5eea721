"""Checks the CPU, the memory and the system's settings: facts in, findings out."""

from fiddler_opt.inputs.model import ModelSpec
from fiddler_opt.insight.finding import Finding
from fiddler_opt.insight.gpu_checks import BESIDES_WEIGHTS_BYTES
from fiddler_opt.units import format_bytes


def bytes_in_ram(model: ModelSpec, gpu_bytes: int) -> int:
    """Weights kept in host memory if the GPU has `gpu_bytes`.

    These are the experts that do not fit the GPU, or all weights if the GPU is too small.
    """
    room = gpu_bytes - model.non_expert_bytes - BESIDES_WEIGHTS_BYTES
    if room < 0:
        return model.all_expert_bytes + model.non_expert_bytes
    return max(0, model.all_expert_bytes - room)


def check_ram(model: ModelSpec, in_ram_bytes: int, available_bytes: int) -> Finding:
    loading = model.shape.loading_bytes
    needs = (
        f"{format_bytes(in_ram_bytes)} of weights in RAM and {format_bytes(loading)} to load them"
    )
    name = model.short_name
    if model.chosen_encoding:
        name += f", stored as {model.chosen_encoding},"
    what = f"{name} needs {needs}, of the {format_bytes(available_bytes)} available"
    if in_ram_bytes + loading <= available_bytes:
        return Finding("ok", what)
    return Finding(
        "stops",
        what,
        "add memory, close other programs, raise the container's limit, or choose a smaller model",
    )


def check_cpu_kernel(variants: list[str] | None, dtype: str) -> Finding:
    if not variants:
        what = "the CPU kernel is not built; PyTorch computes experts at about half the speed"
        return Finding(
            "slow", what, "install a C++20 compiler such as g++ 12, then fiddler-opt again"
        )
    if dtype != "bfloat16":
        what = f"the CPU kernel is for bfloat16; PyTorch computes this model's {dtype} experts"
        return Finding("slow", what, "use a bfloat16 checkpoint")
    lacks = {"portable": "AVX2", "avx2": "AVX-512, which makes prompts faster"}.get(variants[0])
    if lacks:
        return Finding("slow", f"CPU kernel: {variants[0]}; this CPU has no {lacks}")
    return Finding("ok", f"CPU kernel: {variants[0]}")


def check_cores(cpus: int, physical: int, usable: int) -> Finding:
    if usable < cpus:
        what = f"a control group grants the time of {usable} cores on {cpus} CPUs"
        return Finding("slow", what, "raise the container's --cpus or the service's CPUQuota")
    return Finding(
        "ok",
        f"{physical} cores"
        + (f" with {cpus} threads: one of each core is used" if physical < cpus else ""),
    )


def check_busy(
    cores: float | None, busiest: list[tuple[str, float]], usable: int
) -> Finding | None:
    if cores is None or cores < max(0.2, 0.05 * usable):
        return None
    names = ", ".join(f"{name} {used:.1f}" for name, used in busiest)
    what = f"other programs use {cores:.1f} of {usable} cores" + (f" ({names})" if names else "")
    return Finding("slow", what, "close them, above all before `fiddler-opt profile`")


def check_governor(governor: str | None) -> Finding | None:
    if governor in (None, "performance"):
        return None
    return Finding(
        "slow",
        f"the CPU frequency governor is {governor}",
        "`sudo cpupower frequency-set -g performance`",
    )


def check_huge_pages(setting: str | None) -> Finding | None:
    if setting != "never":
        return None
    return Finding(
        "slow",
        "transparent huge pages are off",
        "`echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled`",
    )


def check_profile(profiled: tuple[str, str | None], here: tuple[str, str | None]) -> Finding | None:
    """Compares the profile's machine with this one, each given as the names of CPU and GPU."""
    if profiled == here:
        return None
    there, this = (f"{cpu} with {gpu or 'no GPU'}" for cpu, gpu in (profiled, here))
    return Finding(
        "slow",
        f"the machine profile was made on {there}; this machine is {this}",
        "run `fiddler-opt profile --only machine`",
    )
