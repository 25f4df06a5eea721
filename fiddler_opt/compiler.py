"""compile_plan: the whole planner."""

from fiddler_opt.cost import CostModel
from fiddler_opt.ilp import place
from fiddler_opt.lower import lower
from fiddler_opt.machine import MachineProfile
from fiddler_opt.memory import fixed_memory
from fiddler_opt.model import ModelSpec
from fiddler_opt.routing import Routing
from fiddler_run.plan import Plan, Provenance, Workload


def compile_plan(
    model: ModelSpec,
    machine: MachineProfile,
    routing: Routing,
    workload: Workload,
    gpu_total_bytes: int,
    provenance: dict[str, str],
) -> Plan:
    """The best placement for a workload within `gpu_total_bytes` of GPU memory. `provenance`: all of its keys but the solver's.

    Raises:
        FiddlerError: the budget is too small, or larger than the machine.
    """
    memory = fixed_memory(model, machine, workload, gpu_total_bytes)
    cost = CostModel.build(model, machine, routing, workload, cpu_alone=gpu_total_bytes == 0)
    solution = place(cost, model.block_bytes, memory.total - memory.used)
    made = Provenance(**provenance, solver="HiGHS", status=solution.status, solve_s=round(solution.solve_s, 2))
    return lower(model, machine, cost, solution, memory, workload, made)
