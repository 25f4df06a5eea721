"""Problem: the complete input of the solver, apart from the routing."""

from dataclasses import dataclass, replace

from fiddler_opt.inputs.machine import MachineProfile
from fiddler_opt.inputs.model import ModelSpec
from fiddler_opt.inputs.routing import Routing
from fiddler_opt.solve.cost import CostModel
from fiddler_opt.solve.memory import fixed_memory, host_embedding_bytes
from fiddler_opt.solve.placement import MemoryLimits
from fiddler_opt.solve.times import Policy
from fiddler_opt.units import format_bytes
from fiddler_run.errors import FiddlerError
from fiddler_run.plan.rank import GpuMemory
from fiddler_run.plan.schema import Budget, Plan, Workload


@dataclass(frozen=True)
class Problem:
    """Everything a plan depends on, except the routing.

    `machine` has the ranks that `budget` names. `chunk_tokens`: tokens of a prompt that pass
    through the layers at once.
    """

    model: ModelSpec
    machine: MachineProfile
    workload: Workload
    budget: Budget
    chunk_tokens: int

    @classmethod
    def of(cls, plan: Plan, model: ModelSpec, machine: MachineProfile) -> "Problem":
        """The problem that a plan solves, in its encoding.

        Raises:
            FiddlerError: its blocks have another size than those of a new plan.
        """
        machine = machine.first_ranks(len(plan.ranks)).in_encoding(plan.encoding)
        model = model.in_encoding(plan.encoding).for_ranks(len(plan.ranks))
        if plan.block_neurons != model.block_neurons:
            raise FiddlerError(
                f"the plan's block_neurons is {plan.block_neurons}, but this release plans with"
                f" {model.block_neurons}; make the plan again"
            )
        return cls(model, machine, plan.workload, plan.budget, plan.prefill_chunk_tokens)

    def of_first_rank(self) -> "Problem":
        """The problem of the first rank alone."""
        return replace(
            self,
            model=self.model.for_ranks(1),
            machine=self.machine.first_ranks(1),
            budget=self.budget.model_copy(update={"other_gpu_bytes": []}),
        )

    @property
    def gpu_bytes(self) -> list[int]:
        """The budget of each rank. 0: it uses its CPU alone."""
        return [self.budget.gpu_bytes, *self.budget.other_gpu_bytes]

    @property
    def has_link(self) -> bool:
        """True if experts can be copied to the GPU and the profile timed a whole copy."""
        timed = bool(self.machine.link_expert_us) and self.machine.streams
        return timed and self.budget.gpu_bytes > 0

    @property
    def host_embedding_bytes(self) -> int:
        return host_embedding_bytes(self.model, self.machine, self.budget.gpu_bytes)

    def memory(self, number: int = 0) -> GpuMemory:
        """GPU bytes of a rank by purpose, without resident experts.

        Raises:
            FiddlerError: the budget is too small, or exceeds the machine.
        """
        return fixed_memory(
            self.model,
            self.machine,
            self.workload,
            self.gpu_bytes[number],
            self.chunk_tokens,
            number,
        )

    def memory_limits(self) -> MemoryLimits:
        """The budget that remains for experts.

        Raises:
            FiddlerError: as `memory`; or the host budget does not hold the embedding table; or
                blocks would have to be on disk, but the disk was not timed, or there are several
                ranks.
        """
        first, *others = (
            MemoryLimits(self.model.block_bytes, memory.total - memory.used)
            for memory in map(self.memory, range(len(self.gpu_bytes)))
        )
        return replace(first, host_bytes=self._host_bytes(), others=tuple(others))

    def _host_bytes(self) -> int | None:
        """The bytes that the host budget leaves for experts."""
        host_bytes = self.budget.host_bytes
        if host_bytes is None:
            return None
        if self.budget.other_gpu_bytes:
            raise FiddlerError(
                "--host-mem is for one rank; remove it, or give --gpu-mem a single size"
            )
        if self.machine.disk_bytes_per_s is None:
            raise FiddlerError(
                "--host-mem: the machine profile has no disk speed; `fiddler-opt profile"
                " --model FOLDER` times the checkpoint's, if a file has at least 64 MB"
            )
        if host_bytes < self.host_embedding_bytes:
            raise FiddlerError(
                f"--host-mem {format_bytes(host_bytes)} is too small: the embedding table alone"
                f" takes {format_bytes(self.host_embedding_bytes)}; give more"
            )
        return host_bytes - self.host_embedding_bytes

    def cost(self, routing: Routing, policy: Policy = "together") -> CostModel:
        """The cost model under `routing`.

        Raises:
            FiddlerError: the policy needs a link, and there is none.
        """
        if policy in ("link", "better") and not self.has_link:
            raise FiddlerError(
                "copying experts to the GPU needs a GPU, and host memory that can be page-locked;"
                " plan with --gpu-mem, from the profile of a machine that has both and timed the"
                " share 1.0"
            )
        return CostModel.build(
            self.model,
            self.machine,
            routing,
            self.workload,
            self.chunk_tokens,
            policy,
            cpu_alone=[rank for rank, size in enumerate(self.gpu_bytes) if size == 0],
        )
