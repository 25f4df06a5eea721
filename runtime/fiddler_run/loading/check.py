"""Checks whether a plan can run with its model on this machine.

`fiddler-run` fails with the first problem of a `PlanCheck`; `--dry-run` prints all of them. PyTorch
is imported on demand.
"""

from __future__ import annotations

from pathlib import Path

from fiddler_run.errors import FiddlerError
from fiddler_run.loading.machine_check import (
    disk_problems,
    machine_problems,
    other_gpu_problems,
    plan_gpu,
)
from fiddler_run.loading.model_check import LoadFormat, ModelCheck, refuse
from fiddler_run.plan.schema import Plan
from fiddler_run.system.locate import shipped_file
from fiddler_run.weights.model_folder import local_folder


class PlanCheck(ModelCheck):
    """Checks a plan against its model's files and this machine, for one of its ranks.

    `gpu` is the GPU that the rank will use, or None.
    """

    def __init__(
        self,
        plan: Plan,
        plan_file: Path | None = None,
        model: str | Path | None = None,
        load_format: LoadFormat = "safetensors",
        disk_folder: str | Path | None = None,
        fetch: bool = False,
        number: int = 0,
    ):
        """Runs the checks.

        Args:
            plan_file: where the plan comes from. None: not from a file.
            model: the checkpoint's folder or Hugging Face id. None: the plan's model, relative to
                the plan's file.
            disk_folder: holds the experts that the plan leaves on disk. None: the checkpoint's
                folder or, for random weights, the working directory.
            load_format, fetch: as for a `ModelCheck`.
            number: of the rank.
        """
        origin = "plan" if plan_file is None else str(plan_file)
        name = plan.model.name if model is None else model
        relative_to = (
            plan_file.resolve().parent if plan_file is not None and model is None else Path()
        )
        self.gpu = plan_gpu(plan, number)
        if fetch and local_folder(name, relative_to) is None:  # before a download of all weights
            refuse(machine_problems(plan, self.gpu, origin, number=number))
        super().__init__(plan.model, origin, name, relative_to, load_format, fetch)
        near = self.folder if self.folder is not None and load_format != "dummy" else Path()
        self.disk_folder = near if disk_folder is None else Path(disk_folder)
        self._try(lambda: refuse(disk_problems(plan, self.disk_folder, number)))
        sizes = self.sizes if self.skeleton is not None else None  # of another model
        self.problems += machine_problems(plan, self.gpu, origin, sizes, number)
        notes = device_note(plan, self.gpu is not None, number), prediction_note(plan, origin)
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
    problems += [*checked.problems, *other_gpu_problems(plan, str(path))]
    return problems, checked.notes


def device_note(plan: Plan, on_gpu: bool, number: int = 0) -> str | None:
    """Why a rank's GPU part is not in GPU memory. None if it is, or if there is none."""
    rank = plan.ranks[number]
    if on_gpu or rank.gpu_memory_bytes.total == 0:
        return None
    reason = (
        "the plan is for a machine without CUDA" if rank.device == "cpu" else "no CUDA device here"
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
