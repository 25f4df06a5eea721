"""Finds the limits of this machine and how to lift them.

`examine` gathers the facts; each check is a pure function of facts.
"""

import os

from fiddler_opt.inputs import facts
from fiddler_opt.inputs.machine import MachineProfile
from fiddler_opt.inputs.model import ModelSpec
from fiddler_opt.inputs.processes import busiest
from fiddler_opt.insight import gpu_checks, host_checks
from fiddler_opt.insight.finding import Finding
from fiddler_opt.insight.torch_probe import ProbedGpu, Torch, ask_torch
from fiddler_run.system import host

LISTENING_S = 1.0  # how long other programs are observed


def examine(model: ModelSpec, machine: MachineProfile | None) -> list[Finding]:
    """Examines this machine for a few seconds and returns the findings for `model`.

    `machine` is its profile, if there is one.
    """
    others = host.OtherProcesses()
    processes = busiest(LISTENING_S)
    busy = others.cores()
    gpu_use = facts.gpu_use()
    torch = ask_torch(model)
    if isinstance(torch, Finding):
        return [torch]
    gpu = torch.gpu
    cores = host.num_cores()
    stored = smallest(model, machine)
    in_ram = host_checks.bytes_in_ram(stored, gpu.memory_bytes if gpu else 0)
    findings = [
        _gpu_finding(torch, model),
        *(_gpu_part(gpu, model, in_ram, gpu_use.get(gpu.bus_id)) if gpu else ()),
        host_checks.check_ram(stored, in_ram, host.available_memory_bytes()),
        host_checks.check_cpu_kernel(torch.variants, model.shape.dtype),
        host_checks.check_cores(len(host.allowed_cpus()), host.num_physical_cores(), cores),
        host_checks.check_busy(busy, processes, cores),
        host_checks.check_governor(facts.governor()),
        host_checks.check_huge_pages(facts.transparent_huge_pages()),
    ]
    if machine and machine.source == "measured":
        profiled = machine.cpu.name, machine.device.name if machine.device.kind == "cuda" else None
        here = host.cpu_name(), gpu.name if gpu else None
        findings.append(host_checks.check_profile(profiled, here))
    return [finding for finding in findings if finding]


def smallest(model: ModelSpec, machine: MachineProfile | None) -> ModelSpec:
    """The model in the smallest encoding that has kernels here, as far as the profile knows."""
    stored = machine.stored(model) if machine else [model]
    return min(stored, key=lambda each: each.all_expert_bytes)


def _gpu_finding(torch: Torch, model: ModelSpec) -> Finding:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    driver = facts.nvidia_driver()
    return gpu_checks.check_gpu(torch, model, driver, facts.has_nvidia_gpu(), visible)


def _gpu_part(
    gpu: ProbedGpu, model: ModelSpec, in_ram: int, use: facts.GpuUse | None
) -> list[Finding | None]:
    """The findings about a GPU that PyTorch can use."""
    own_nodes = {host.numa_node(cpu) for cpu in host.allowed_cpus()}
    needed = in_ram + model.shape.loading_bytes
    limit = facts.memlock_limit_bytes()
    return [
        gpu_checks.check_gpu_kernels(gpu.kernels_suit, gpu.kernel_error, model.shape.dtype),
        gpu_checks.check_link(gpu.link, gpu.h2d_bytes_per_s),
        gpu_checks.check_memlock(limit, in_ram, gpu.locks_freely, facts.is_wsl()),
        gpu_checks.check_numa(
            facts.gpu_numa_node(gpu.bus_id), own_nodes, facts.numa_nodes(), needed
        ),
        gpu_checks.check_gpu_use(use),
    ]
