"""Checks whether this machine has the memory and the cores that a rank of a plan needs.

PyTorch is imported on demand.
"""

import shutil
from pathlib import Path

from fiddler_run.errors import FiddlerError
from fiddler_run.models.sizes import ModelSizes
from fiddler_run.plan.rank import GpuMemory
from fiddler_run.plan.schema import Plan
from fiddler_run.system.files import exists, is_folder, reason
from fiddler_run.system.gpu import Gpu, current_gpu, gpu_at, num_gpus
from fiddler_run.system.host import available_memory_bytes, num_cores


def machine_problems(
    plan: Plan, gpu: Gpu | None, origin: str, sizes: ModelSizes | None = None, number: int = 0
) -> list[str]:
    """The requirements of a rank that this machine does not meet.

    The first rank of a machine answers for what all of them share: GPUs, cores, host memory.

    Args:
        gpu: the GPU for the rank's GPU part. None if that part is kept in host memory.
        sizes: the model's. None: checks that need them are left out.
        number: of the rank.
    """
    rank = plan.ranks[number]
    embedding_bytes = rank.host_memory_bytes.embedding
    besides = rank.gpu_memory_bytes.staging
    if number == 0:
        besides = 0 if sizes is None else besides_experts_bytes(plan, sizes)
    problems = [
        gpu and gpu_memory_problem(rank.gpu_memory_bytes, gpu),
        gpu and gpu_part_problem(rank.gpu_memory_bytes, besides - embedding_bytes),
    ]
    here = plan.ranks_beside(number)
    if number == here[0]:
        what = "experts and embedding" if embedding_bytes else "experts"
        on_gpus = [gpu if each == number else plan_gpu(plan, each) for each in here]
        held = sum(map(plan.held_ram_bytes, map(bool, on_gpus), here))
        loading = len(here) * plan.model.loading_bytes
        available = available_memory_bytes()
        problems[:0] = [
            gpu_count_problem(plan, number, num_gpus()),
            core_problem(sum(plan.ranks[each].cpu_threads for each in here), num_cores()),
            host_memory_problem(
                what, held, loading, available, 0 if gpu else max(0, besides - embedding_bytes)
            ),
        ]
    return [f"{origin}: {problem}" for problem in problems if problem]


def other_gpu_problems(plan: Plan, origin: str) -> list[str]:
    """The GPU memory that further ranks on the machine of rank 0 lack.

    A rank that is loaded checks its own GPU.
    """
    problems = []
    for place, number in enumerate(plan.gpu_ranks_beside(0)):
        if number == 0 or place >= num_gpus():
            continue
        try:
            problem = gpu_memory_problem(plan.ranks[number].gpu_memory_bytes, gpu_at(place))
        except FiddlerError as error:
            problem = str(error)
        if problem is not None:
            problems.append(f"{origin}: ranks[{number}]: {problem}")
    return problems


def besides_experts_bytes(plan: Plan, sizes: ModelSizes) -> int:
    """Memory for the weights outside the experts, the KV cache and the staging ring."""
    workload = plan.workload
    cache = sizes.cache_bytes(workload.sequences, workload.max_seq_len)
    return sizes.dense_bytes + cache + plan.rank.gpu_memory_bytes.staging


def disk_problems(plan: Plan, folder: Path, number: int = 0) -> list[str]:
    """Problems with the folder for the experts that a rank leaves on disk."""
    disk_bytes = plan.ranks[number].disk_bytes
    if disk_bytes and not exists(folder):
        return [
            f"{folder}: no such folder for the experts on disk; name another one with --disk-folder"
        ]
    try:
        free = shutil.disk_usage(folder).free if disk_bytes and is_folder(folder) else 0
    except OSError as error:
        return [
            f"{folder}: cannot determine the free space: {reason(error)}; name another folder"
            " with --disk-folder"
        ]
    if disk_bytes <= free:
        return []
    return [
        f"{folder}: the plan keeps {disk_bytes / 1e9:.2f} GB of experts on disk, but"
        f" {free / 1e9:.2f} GB is free there; name another folder with --disk-folder, or plan"
        " with more --host-mem"
    ]


def gpu_count_problem(plan: Plan, number: int, gpus: int) -> str | None:
    """The problem if a machine has some GPUs, but fewer than its ranks use."""
    needed = len(plan.gpu_ranks_beside(number))
    if gpus == 0 or needed <= gpus:
        return None
    return (
        f"its ranks use {needed} GPUs of this machine, but {gpus} can be used; check"
        " CUDA_VISIBLE_DEVICES, or plan with fewer sizes at --gpu-mem"
    )


def core_problem(threads: int, cores: int) -> str | None:
    if threads <= cores:
        return None
    return (
        f"cpu_threads is {threads}, but {cores} cores are available here; profile this machine"
        " with `fiddler-opt profile` and plan again"
    )


def host_memory_problem(
    what: str, held_bytes: int, loading_bytes: int, available_bytes: int, besides_bytes: int = 0
) -> str | None:
    """The problem if host memory cannot hold a plan's host part while it is loaded.

    Without this check, the kernel's OOM killer would end the load.
    """
    if held_bytes + loading_bytes + besides_bytes <= available_bytes:
        return None
    besides = ""
    if besides_bytes:
        besides = f" and {besides_bytes / 1e9:.2f} GB for all other weights and buffers"
    return (
        f"its {what} need {held_bytes / 1e9:.2f} GB of host memory, plus"
        f" {loading_bytes / 1e9:.2f} GB while loading{besides}, but {available_bytes / 1e9:.2f} GB"
        " is available; close other programs, add memory, or plan with more --gpu-mem"
    )


def gpu_memory_problem(memory: GpuMemory, gpu: Gpu) -> str | None:
    """The problem if less GPU memory is free than the plan needs besides its reserve.

    The driver and libraries have already taken the reserve.
    """
    needed = memory.total - memory.reserve
    if needed <= gpu.free_bytes:
        return None
    return (
        f"gpu_memory_bytes.total is {memory.total / 1e9:.2f} GB, but {gpu.name} has"
        f" {gpu.free_bytes / 1e9:.2f} GB free, and {needed / 1e9:.2f} GB is needed besides the"
        " reserve; free GPU memory, or plan again with a smaller --gpu-mem"
    )


def gpu_part_problem(memory: GpuMemory, besides_bytes: int) -> str | None:
    """The problem if a plan leaves too little GPU memory for everything but the experts.

    It is computed from the model, whatever the plan states.
    """
    room = memory.total - memory.reserve - memory.experts
    if besides_bytes <= room:
        return None
    return (
        f"gpu_memory_bytes leaves {max(0, room) / 1e9:.2f} GB for everything but the experts,"
        f" but attention, KV cache and staging need {besides_bytes / 1e9:.2f}; plan again for this"
        " workload"
    )


def plan_gpu(plan: Plan, number: int = 0) -> Gpu | None:
    """The GPU that a rank will use, the current one. None if it has no GPU part, or if that is
    kept in host memory.

    That is the case if the plan is for a machine without CUDA, or if this machine has no GPU.
    """
    rank = plan.ranks[number]
    return current_gpu() if rank.device == "cuda" and rank.gpu_memory_bytes.total else None
