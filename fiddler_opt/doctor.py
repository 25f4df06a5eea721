"""What limits this machine, and what to do about it. Rule: checks are functions of facts; `examine` gathers the facts.

PyTorch is asked in a process of its own, so that what it does to the GPU ends with that process.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import Literal

from rich.console import Console

from fiddler_opt import facts
from fiddler_opt.machine import MachineProfile
from fiddler_opt.model import ModelSpec
from fiddler_opt.units import format_bytes
from fiddler_run import host

LOADING_BYTES = 6_000_000_000  # of RAM besides the experts, while they are loaded
GPU_BESIDES_WEIGHTS_BYTES = 2_500_000_000  # KV cache, buffers and driver in a plan for 4096 tokens
LISTENING_S = 1.0  # to other programs, and until a GPU that copies has raised its link's speed
COLORS = {"stops": "red", "slow": "yellow", "ok": "green"}  # the worst first


@dataclass(frozen=True)
class Finding:
    """`stops`: the model cannot run here; `slow`: it can, but not as fast as it might."""

    kind: Literal["ok", "slow", "stops"]
    what: str
    remedy: str | None = None


@dataclass(frozen=True)
class Gpu:
    """The GPU that PyTorch uses. `kernels_suit`: whether the GPU kernels are for this model; `kernel_error`: why they cannot be
    compiled. `locks_freely`: whether memory is page-locked whatever `ulimit -l` says. `h2d_bytes_per_s`: copies from page-locked
    memory."""

    name: str
    bus_id: str
    memory_bytes: int
    kernels_suit: bool
    kernel_error: str | None
    locks_freely: bool
    link: facts.PcieLink | None = None
    h2d_bytes_per_s: float | None = None


@dataclass(frozen=True)
class Torch:
    """PyTorch, the CUDA version it was built for, the variants of the CPU kernel that run here, and why it uses no GPU."""

    version: str
    cuda: str | None
    variants: list[str] | None
    refusal: str | None
    gpu: Gpu | None


def examine(model: ModelSpec, machine: MachineProfile | None) -> list[Finding]:
    """Looks at this machine for some seconds: what to know before running `model` on it, with its profile if there is one."""
    others = host.OtherProcesses()
    busiest = facts.busiest(LISTENING_S)
    busy, gpu_use = others.cores(), facts.gpu_use()
    torch = ask_torch(model)
    if isinstance(torch, Finding):
        return [torch]
    gpu, cpus, cores = torch.gpu, host.allowed_cpus(), host.num_cores()
    in_ram = bytes_in_ram(model, gpu.memory_bytes if gpu else 0)
    findings = [check_gpu(torch, model, facts.nvidia_driver(), facts.has_nvidia_gpu(), os.environ.get("CUDA_VISIBLE_DEVICES"))]
    if gpu:
        nodes = {host.numa_node(cpu) for cpu in cpus}
        findings += [
            check_gpu_kernels(gpu.kernels_suit, gpu.kernel_error, model.shape.dtype),
            check_link(gpu.link, gpu.h2d_bytes_per_s),
            check_memlock(facts.memlock_limit_bytes(), in_ram, gpu.locks_freely, facts.is_wsl()),
            check_numa(facts.gpu_numa_node(gpu.bus_id), nodes, facts.numa_nodes(), in_ram),
            check_gpu_use(gpu_use.get(gpu.bus_id)),
        ]
    findings += [
        check_ram(model, in_ram, host.available_memory_bytes()),
        check_cpu_kernel(torch.variants, model.shape.dtype),
        check_cores(len(cpus), host.num_physical_cores(), cores),
        check_busy(busy, busiest, cores),
        check_governor(facts.governor()),
        check_huge_pages(facts.transparent_huge_pages()),
    ]
    if machine and machine.source == "measured":
        profiled = machine.cpu.name, machine.device.name if machine.device.kind == "cuda" else None
        findings.append(check_profile(profiled, (host.cpu_name(), gpu.name if gpu else None)))
    return [finding for finding in findings if finding]


def stops(findings: list[Finding]) -> bool:
    """Whether the model cannot run here."""
    return any(finding.kind == "stops" for finding in findings)


def print_findings(console: Console, findings: list[Finding]) -> None:
    """One line each, the worst first."""
    for kind, color in COLORS.items():
        for finding in findings:
            if finding.kind == kind:
                line = f"{kind:5}  {finding.what}" + (f"; {finding.remedy}" if finding.remedy else "")
                console.print(line, style=color, markup=False, highlight=False, soft_wrap=True)


def bytes_in_ram(model: ModelSpec, gpu_bytes: int) -> int:
    """Weights that lie in host memory beside a GPU of that size: the experts it cannot hold; all weights where it is too small."""
    room = gpu_bytes - model.non_expert_bytes - GPU_BESIDES_WEIGHTS_BYTES
    if room < 0:
        return model.all_expert_bytes + model.non_expert_bytes
    return max(0, model.all_expert_bytes - room)


def check_gpu(torch: Torch, model: ModelSpec, driver: facts.Driver | None, has_nvidia_gpu: bool, visible: str | None) -> Finding:
    """`visible`: the value of CUDA_VISIBLE_DEVICES."""
    if torch.gpu:
        size = f"{torch.gpu.name}, {format_bytes(torch.gpu.memory_bytes)}"
        if torch.gpu.memory_bytes < model.non_expert_bytes + GPU_BESIDES_WEIGHTS_BYTES:
            needs = format_bytes(model.non_expert_bytes + GPU_BESIDES_WEIGHTS_BYTES)
            return Finding("slow", f"{size}: too little for a GPU part, about {needs} before any expert", "plan with --gpu-mem 0GB")
        return Finding("ok", size)
    if not has_nvidia_gpu:
        return Finding("slow", "no NVIDIA GPU: everything runs on the CPU", "plan with --gpu-mem 0GB")
    if torch.cuda is None:
        supports = f", for CUDA {driver.cuda} or older" if driver and driver.cuda else ""
        what = f"there is an NVIDIA GPU, but PyTorch {torch.version} was built without CUDA"
        return Finding("slow", what, f"install PyTorch for CUDA{supports} (https://pytorch.org/get-started/locally)")
    if visible is not None and visible.strip() in ("", "-1"):
        return Finding("slow", f"CUDA_VISIBLE_DEVICES={visible} hides the GPU", "unset it")
    built = f"PyTorch {torch.version}, built for CUDA {torch.cuda}, cannot use the GPU ({torch.refusal})"
    if driver is None:
        return Finding("slow", f"{built}; no driver answers", "install NVIDIA's driver, restart; in a container, pass --gpus all")
    known = f"driver {driver.version or 'unknown'}" + (f" supports CUDA up to {driver.cuda}" if driver.cuda else "")
    older = f"PyTorch for CUDA {driver.cuda} or older" if driver.cuda else "PyTorch for an older CUDA"
    return Finding("slow", f"{built}; {known}", f"update the driver and restart, or install {older}")


def check_gpu_kernels(suit: bool, error: str | None, dtype: str) -> Finding:
    if not suit and dtype != "bfloat16":
        return Finding("slow", f"the GPU kernels are not for {dtype}, decode will be slower", "take a bfloat16 checkpoint")
    if not suit:
        return Finding("slow", "the GPU kernels are not for experts of this model's sizes, decode will be slower")
    if error is None:
        return Finding("ok", "the GPU kernels compile")
    remedy = "install a C compiler and Python's headers (gcc, python3-dev), and Triton, which comes with PyTorch for CUDA"
    return Finding("slow", f"the GPU kernels cannot be compiled, decode will be slower ({error})", remedy)


def check_link(link: facts.PcieLink | None, h2d_bytes_per_s: float | None) -> Finding | None:
    reach = f"copies to the GPU reach {format_bytes(h2d_bytes_per_s)}/s" if h2d_bytes_per_s else None
    if link is None or (h2d_bytes_per_s or 0) > link.bytes_per_s:  # a virtual machine's link may be told wrongly
        return Finding("ok", reach) if reach else None
    now = f"PCIe {link.generation}.0 x{link.width}"
    if link.bytes_per_s < link.max_bytes_per_s:
        times = link.max_bytes_per_s / link.bytes_per_s
        what = f"the GPU's link is {now}, card and slot can do {link.max_generation}.0 x{link.max_width}: {times:.1f} times as fast"
        return Finding("slow", what, "seat the card anew, without a riser; free slots that share its lanes; check the BIOS")
    carries = f"{now} carries {format_bytes(link.bytes_per_s)}/s"
    if h2d_bytes_per_s and h2d_bytes_per_s < 0.6 * link.bytes_per_s:
        return Finding("slow", f"{reach}, but {carries}", "end other copies; try the kernel's option iommu=pt")
    return Finding("ok", f"{carries}" + (f", {reach}" if reach else ""))


def check_memlock(limit_bytes: int | None, needed_bytes: int, locks_freely: bool, wsl: bool) -> Finding:
    alone = "experts that cannot be page-locked are left to the CPU, by plans from a profile of this machine"
    if wsl and needed_bytes:
        return Finding("slow", f"WSL lets little host memory be page-locked: {alone}", "use Linux itself for fast prompts")
    if limit_bytes is None or limit_bytes >= needed_bytes or locks_freely:
        return Finding("ok", "host memory can be page-locked for copies to the GPU")
    what = f"only {format_bytes(limit_bytes)} of host memory may be page-locked, experts need {format_bytes(needed_bytes)}"
    return Finding(
        "slow", f"{what}: {alone}", "`ulimit -l unlimited`, or memlock in /etc/security/limits.conf; docker: --ulimit memlock=-1"
    )


def check_numa(gpu_node: int | None, own_nodes: set[int], nodes: list[facts.NumaNode] | None, needed_bytes: int) -> Finding | None:
    near = next((node for node in nodes or [] if node.number == gpu_node and node.cpus), None)
    if near is None or gpu_node in own_nodes:
        return None
    bind = "--membind" if near.memory_bytes >= needed_bytes + LOADING_BYTES else "--preferred"
    here = ", ".join(map(str, sorted(own_nodes)))
    what = f"the GPU is attached to NUMA node {gpu_node}, this process may use CPUs of node {here} only"
    return Finding("slow", what, f"start it with `numactl --cpunodebind={gpu_node} {bind}={gpu_node}`")


def check_gpu_use(use: facts.GpuUse | None) -> Finding | None:
    if use is None or (not use.processes and (use.utilisation or 0) < 0.1):
        return None
    taken = format_bytes(sum(size or 0 for size in use.processes.values()))
    busy = "" if use.utilisation is None else f", {use.utilisation:.0%} busy"
    what = f"the GPU is in use: {len(use.processes)} other processes with {taken} of its memory{busy}"
    return Finding("slow", what, "end them (`nvidia-smi` lists them), or plan with a --gpu-mem that leaves them theirs")


def check_ram(model: ModelSpec, in_ram_bytes: int, available_bytes: int) -> Finding:
    loading = min(LOADING_BYTES, model.all_expert_bytes)
    needs = f"{format_bytes(in_ram_bytes)} of weights in RAM and {format_bytes(loading)} to load them"
    what = f"{model.short_name} needs {needs}, {format_bytes(available_bytes)} are available"
    if in_ram_bytes + loading <= available_bytes:
        return Finding("ok", what)
    return Finding("stops", what, "add memory, close other programs, raise the container's limit, or take a smaller model")


def check_cpu_kernel(variants: list[str] | None, dtype: str) -> Finding:
    if not variants:
        what = "the CPU kernel is not built, PyTorch computes experts at about half the speed"
        return Finding("slow", what, "install a C++20 compiler such as g++ 12, then fiddler-opt again")
    if dtype != "bfloat16":
        what = f"the CPU kernel is for bfloat16; PyTorch computes this model's {dtype} experts"
        return Finding("slow", what, "take a bfloat16 checkpoint")
    lacks = {"portable": "AVX2", "avx2": "AVX-512, which makes prompts faster"}.get(variants[0])
    if lacks:
        return Finding("slow", f"CPU kernel: {variants[0]}; this CPU has no {lacks}")
    return Finding("ok", f"CPU kernel: {variants[0]}")


def check_cores(cpus: int, physical: int, usable: int) -> Finding:
    if usable < cpus:
        what = f"a control group grants the time of {usable} cores on {cpus} CPUs"
        return Finding("slow", what, "raise the container's --cpus or the service's CPUQuota")
    return Finding("ok", f"{physical} cores" + (f" with {cpus} threads: one of each core is used" if physical < cpus else ""))


def check_busy(cores: float | None, busiest: list[tuple[str, float]], usable: int) -> Finding | None:
    if cores is None or cores < max(0.2, 0.05 * usable):
        return None
    names = ", ".join(f"{name} {used:.1f}" for name, used in busiest)
    what = f"other programs take {cores:.1f} of {usable} cores" + (f" ({names})" if names else "")
    return Finding("slow", what, "close them, above all before `fiddler-opt profile`")


def check_governor(governor: str | None) -> Finding | None:
    if governor in (None, "performance"):
        return None
    return Finding("slow", f"the CPU's clock is governed by {governor}", "`sudo cpupower frequency-set -g performance`")


def check_huge_pages(setting: str | None) -> Finding | None:
    if setting != "never":
        return None
    return Finding(
        "slow", "transparent huge pages are off", "`echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled`"
    )


def check_profile(profiled: tuple[str, str | None], here: tuple[str, str | None]) -> Finding | None:
    """Each the names of a machine's CPU and GPU."""
    if profiled == here:
        return None
    there, this = (f"{cpu} with {gpu or 'no GPU'}" for cpu, gpu in (profiled, here))
    return Finding("slow", f"the machine profile is of {there}, this is {this}", "run `fiddler-opt profile --only machine`")


def ask_torch(model: ModelSpec) -> Torch | Finding:
    """What PyTorch finds, and how fast it copies to the GPU, whose link is looked at meanwhile; a finding if it does not start."""
    blocks = [model.shape.dtype, str(model.shape.hidden_size), str(model.block_neurons)]
    with tempfile.TemporaryFile("w+") as errors:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors, "text": True}
        with subprocess.Popen([sys.executable, "-P", "-m", "fiddler_opt.bench_probe", *blocks], **pipes) as probe:
            answer = json.loads(probe.stdout.readline() or "null")
            gpu, link = answer and answer["gpu"], None
            if gpu:
                time.sleep(LISTENING_S)
                link = facts.pcie_link(gpu["bus_id"])
            rate, _ = probe.communicate()  # the end of its input ends its copies
        errors.seek(0)
        reason = errors.read().strip().rpartition("\n")[2] or f"exit status {probe.returncode}"
    if answer is None:
        return Finding("stops", f"PyTorch does not start: {reason}", "install fiddler-opt again")
    if gpu:
        measured = {"link": link, "h2d_bytes_per_s": float(rate)} if rate else {}
        gpu["kernel_error"] = gpu["kernel_error"] and gpu["kernel_error"].splitlines()[0]
        answer["gpu"] = Gpu(**gpu, **measured)
    answer["refusal"] = answer["refusal"] and answer["refusal"].split(". ")[0]
    return Torch(**answer)
