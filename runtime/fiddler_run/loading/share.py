"""Loads a rank's share of the experts. All checks precede the long work."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import torch

from fiddler_run.loading.check import PlanCheck
from fiddler_run.loading.model_check import LoadFormat
from fiddler_run.plan.schema import Plan
from fiddler_run.ranks.cores import on_own_cores
from fiddler_run.system.gpu import gpu_numa_nodes, num_gpus
from fiddler_run.system.process_settings import allow_gpu_memory
from fiddler_run.weights.checkpoint import Checkpoint, DummyWeights
from fiddler_run.weights.store import ExpertStore
from fiddler_run.weights.tensor_files import TensorFiles

SAMPLED_BYTES = 2**16  # of each file, to tell models apart


class ShareLoader:
    """A rank's part of a plan, and a checkpoint, that passed all checks.

    `device` is the rank's.
    """

    def __init__(
        self,
        plan: Plan,
        number: int,
        model: str | Path | None,
        load_format: LoadFormat,
        disk_folder: str | Path | None,
        plan_file: Path | None = None,
    ):
        """Runs the checks.

        Args:
            number: of the rank.
            model, load_format, disk_folder, plan_file: as for a `PlanCheck`.

        Raises:
            FiddlerError: the plan does not fit this model or this machine, or the checkpoint is
                incomplete.
        """
        self.plan = plan
        self.number = number
        _use_gpu(plan, number)
        checked = PlanCheck(
            plan, plan_file, model, load_format, disk_folder, fetch=True, number=number
        )
        checked.refuse()
        self._checked = checked
        self.notes = checked.notes
        if load_format == "dummy":
            self.weights = DummyWeights(plan.model, getattr(torch, plan.model.dtype))
        else:
            self.weights = Checkpoint(checked.files, checked.tensors)
        self.device = torch.device("cpu")
        if checked.gpu is not None:
            self.device = torch.device("cuda", torch.cuda.current_device())
            memory = plan.ranks[number].gpu_memory_bytes
            allow_gpu_memory(checked.skeleton, self.device, memory.total - memory.reserve)

    def on_own_cores(self) -> AbstractContextManager[None]:
        """Binds this thread to the rank's part of the cores. Threads that it starts stay bound."""
        here = self.plan.ranks_beside(self.number)
        threads = [self.plan.ranks[rank].cpu_threads for rank in here]
        return on_own_cores(threads, here.index(self.number), gpu_numa_nodes())

    @property
    def model_id(self) -> str:
        """Identifies the weights; see `model_id`."""
        if isinstance(self.weights, DummyWeights):
            return "random"
        return model_id(self.weights.files)

    @torch.inference_mode(False)  # tensors made in inference mode cannot be written to outside it
    def load_store(self, on_bytes: Callable[[int], None]) -> ExpertStore:
        """Loads the rank's experts. Calls `on_bytes` with the bytes loaded since its last call."""
        store = ExpertStore(self.plan, self.device, self._checked.disk_folder, self.number)
        store.load(self.weights, on_bytes)
        return store


def _use_gpu(plan: Plan, number: int) -> None:
    """Makes the rank's GPU the current one, if the plan uses several on this machine."""
    with_gpu = plan.gpu_ranks_beside(number)
    if len(with_gpu) > 1 and number in with_gpu and with_gpu.index(number) < num_gpus():
        torch.cuda.set_device(with_gpu.index(number))


def model_id(files: TensorFiles) -> str:
    """A hash of the files' names, sizes and last bytes."""
    found = hashlib.sha256()
    for path in sorted(files.paths):
        size = path.stat().st_size
        with path.open("rb") as file:
            file.seek(max(0, size - SAMPLED_BYTES))
            found.update(f"{path.name} {size}".encode() + file.read())
    return found.hexdigest()
