"""Problem: all that a plan follows from, and what the solver needs to know of it."""

from dataclasses import dataclass

from fiddler_opt.cost import CostModel, Policy
from fiddler_opt.ilp import Room
from fiddler_opt.machine import MachineProfile
from fiddler_opt.memory import fixed_memory
from fiddler_opt.model import ModelSpec
from fiddler_opt.routing import Routing
from fiddler_run.errors import FiddlerError
from fiddler_run.plan import GpuMemory, Workload


@dataclass(frozen=True)
class Budget:
    """`host_bytes` None: what is absent lies in host memory, however much it is. Otherwise the rest lies on disk."""

    gpu_bytes: int
    host_bytes: int | None = None


@dataclass(frozen=True)
class Problem:
    """`chunk_tokens`: of a prompt that pass the layers at once."""

    model: ModelSpec
    machine: MachineProfile
    workload: Workload
    budget: Budget
    chunk_tokens: int

    @property
    def has_link(self) -> bool:
        """True if experts can be copied to the GPU, and the profile says how long a whole one takes."""
        return bool(self.machine.link_expert_us) and self.machine.streams and self.budget.gpu_bytes > 0

    def memory(self) -> GpuMemory:
        """GPU bytes by purpose, before anything is placed; the embedding counts as if it lay there.

        Raises:
            FiddlerError: the budget is too small, or larger than the machine.
        """
        return fixed_memory(self.model, self.machine, self.workload, self.budget.gpu_bytes, self.chunk_tokens)

    def room(self) -> Room:
        """
        Raises:
            FiddlerError: as `memory`; or experts must lie on disk, but the disk was not timed.
        """
        if self.budget.host_bytes is not None and self.machine.disk_bytes_per_s is None:
            raise FiddlerError(
                "--host-mem: the machine profile knows no disk speed; `fiddler-opt profile --model FOLDER` times the checkpoint's"
            )
        memory, movable = self.memory(), 0
        if memory.total and self.machine.host_embedding_us and not self.model.tie_word_embeddings:
            movable = self.model.embedding_bytes
        return Room(self.model.block_bytes, memory.total - memory.used + movable, self.budget.host_bytes, movable)

    def cost(self, routing: Routing, policy: Policy = "together") -> CostModel:
        """
        Raises:
            FiddlerError: the policy needs a link, and there is none.
        """
        alone = self.budget.gpu_bytes == 0
        if policy in ("link", "better") and not self.has_link:
            raise FiddlerError(
                "copying experts to the GPU needs a GPU, and host memory that can be page-locked; plan with "
                "--gpu-mem, from the profile of a machine that has both and timed the share 1.0"
            )
        return CostModel.build(self.model, self.machine, routing, self.workload, self.chunk_tokens, policy, cpu_alone=alone)
