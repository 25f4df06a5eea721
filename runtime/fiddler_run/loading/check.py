"""Checks whether a plan can run with its model on this machine.

`fiddler-run` fails with the first problem of a `PlanCheck`; `--dry-run` prints all of them. PyTorch
is imported on demand.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from fiddler_run.errors import FiddlerError
from fiddler_run.loading.model_check import LoadFormat, ModelCheck, refuse
from fiddler_run.models.sizes import ModelSizes
from fiddler_run.plan.rank import GpuMemory
from fiddler_run.plan.schema import Plan
from fiddler_run.system.files import exists, is_folder, reason
from fiddler_run.system.gpu import Gpu, current_gpu
from fiddler_run.system.host import available_memory_bytes, num_cores
from fiddler_run.system.locate import shipped_file
from fiddler_run.weights.model_folder import local_folder


class PlanCheck(ModelCheck):
    """Checks a plan against its model's files and this machine.

    `gpu` is the GPU that the plan will use, or None.
    """

    def __init__(
        self,
        plan: Plan,
        plan_file: Path | None = None,
        model: str | Path | None = None,
        load_format: LoadFormat = "safetensors",
        disk_folder: str | Path | None = None,
        fetch: bool = False,
    ):
        """Runs the checks.

        Args:
            plan_file: where the plan comes from. None: not from a file.
            model: the checkpoint's folder or Hugging Face id. None: the plan's model, relative to
                the plan's file.
            disk_folder: holds the experts that the plan leaves on disk. None: the checkpoint's
                folder or, for random weights, the working directory.
            load_format, fetch: as for a `ModelCheck`.
        """
        origin = "plan" if plan_file is None else str(plan_file)
        name = plan.model.name if model is None else model
        relative_to = (
            plan_file.resolve().parent if plan_file is not None and model is None else Path()
        )
        self.gpu = plan_gpu(plan)
        if fetch and local_folder(name, relative_to) is None:  # before a download of all weights
            refuse(machine_problems(plan, self.gpu, origin))
        super().__init__(plan.model, origin, name, relative_to, load_format, fetch)
        near = self.folder if self.folder is not None and load_format != "dummy" else Path()
        self.disk_folder = near if disk_folder is None else Path(disk_folder)
        self._try(lambda: refuse(disk_problems(plan, self.disk_folder)))
        sizes = self.sizes if self.skeleton is not None else None  # of another model
        self.problems += machine_problems(plan, self.gpu, origin, sizes)
        notes = device_note(plan, on_gpu=self.gpu is not None), prediction_note(plan, origin)
        self.notes += [note for note in notes if note]


def check_plan(
    path: str | Path,
    model: str | None = None,
    load_format: LoadFormat = "safetensors",
    disk_folder: str | None = None,
) -> tuple[list[str], list[str]]:
    """Checks the plan in a file against everything that running it needs.

    Takes little memory and does not download weights.

    Args:
        path: the plan's file. `plans/demo.yaml` is found wherever the package is installed.
        model, load_format, disk_folder: as for a `PlanCheck`.

    Returns:
        All problems, one per line, and notes on what could not be checked or is worth knowing.
    """
    try:
        path = shipped_file(path)
        plan, problems = Plan.examine(Plan.read(path), str(path))
    except FiddlerError as error:
        plan = None
        problems = [str(error)]
    if plan is None:
        return problems, [
            "the model and this machine were not checked, because the plan cannot be read"
        ]
    checked = PlanCheck(plan, path, model, load_format, disk_folder)
    return [*problems, *checked.problems], checked.notes


def machine_problems(
    plan: Plan, gpu: Gpu | None, origin: str, sizes: ModelSizes | None = None
) -> list[str]:
    """The requirements of a plan that this machine does not meet.

    Args:
        gpu: the GPU for the plan's GPU part. None if that part is kept in host memory.
        sizes: the model's. None: checks that need them are left out.
    """
    embedding_bytes = plan.rank.host_memory_bytes.embedding
    besides = 0 if sizes is None else besides_experts_bytes(plan, sizes)
    what = "experts and embedding" if embedding_bytes else "experts"
    held = plan.held_ram_bytes(gpu is not None)
    loading = plan.model.loading_bytes
    problems = [
        core_problem(plan.rank.cpu_threads, num_cores()),
        host_memory_problem(what, held, loading, available_memory_bytes(), 0 if gpu else besides),
        gpu and gpu_memory_problem(plan.rank.gpu_memory_bytes, gpu),
        gpu and gpu_part_problem(plan.rank.gpu_memory_bytes, besides - embedding_bytes),
    ]
    return [f"{origin}: {problem}" for problem in problems if problem]


def besides_experts_bytes(plan: Plan, sizes: ModelSizes) -> int:
    """Memory for the weights outside the experts, the KV cache and the staging ring."""
    workload = plan.workload
    cache = sizes.cache_bytes(workload.sequences, workload.max_seq_len)
    return sizes.dense_bytes + cache + plan.rank.gpu_memory_bytes.staging


def disk_problems(plan: Plan, folder: Path) -> list[str]:
    """Problems with the folder for the experts that the plan leaves on disk."""
    if plan.rank.disk_bytes and not exists(folder):
        return [
            f"{folder}: no such folder for the experts on disk; name another one with --disk-folder"
        ]
    try:
        free = shutil.disk_usage(folder).free if plan.rank.disk_bytes and is_folder(folder) else 0
    except OSError as error:
        return [
            f"{folder}: cannot determine the free space: {reason(error)}; name another folder"
            " with --disk-folder"
        ]
    if plan.rank.disk_bytes <= free:
        return []
    return [
        f"{folder}: the plan keeps {plan.rank.disk_bytes / 1e9:.2f} GB of experts on disk, but"
        f" {free / 1e9:.2f} GB is free there; name another folder with --disk-folder, or plan"
        " with more --host-mem"
    ]


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


def plan_gpu(plan: Plan) -> Gpu | None:
    """The GPU that a plan will use. None if the plan has no GPU part, or if it is kept in host
    memory.

    That is the case if the plan is for a machine without CUDA, or if this machine has no GPU.
    """
    rank = plan.rank
    return current_gpu() if rank.device == "cuda" and rank.gpu_memory_bytes.total else None


def device_note(plan: Plan, on_gpu: bool) -> str | None:
    """Why a plan's GPU part is not in GPU memory. None if it is, or if there is none."""
    if on_gpu or plan.rank.gpu_memory_bytes.total == 0:
        return None
    reason = (
        "the plan is for a machine without CUDA"
        if plan.rank.device == "cpu"
        else "no CUDA device here"
    )
    return f"{reason}: the GPU part is kept in host memory and computed by the CPU"


def prediction_note(plan: Plan, origin: str) -> str | None:
    """A note on predicted figures that contradict each other. None if they are consistent.

    Such figures would mislead, because measurements are shown next to them.
    """
    predicted = plan.predicted
    batch_size = plan.workload.batch_size
    stated_ms = {
        "decode_ms": (predicted.decode_ms, 1e3 * batch_size / predicted.decode_tokens_per_s),
        "ttft_ms": (predicted.ttft_ms, 1e3 * predicted.ttft_s),
    }
    wrong = [
        f"{key} adds up to {sum(parts.values()):g}, not {whole:g}"
        for key, (parts, whole) in stated_ms.items()
        if abs(sum(parts.values()) - whole) > 0.02 * whole + 0.1  # the parts are rounded
    ]
    if predicted.decode_tokens_per_s > 1.001 * predicted.bound_tokens_per_s:
        wrong.append("decode_tokens_per_s exceeds its bound")
    return f"{origin}: predicted: {'; '.join(wrong)}; the figures were edited" if wrong else None
