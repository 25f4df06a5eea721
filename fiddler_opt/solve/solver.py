"""HiGHS, as called by PuLP, and when it may stop."""

from collections.abc import Mapping
from math import isfinite

import highspy
import numpy as np
import pulp

from fiddler_opt.solve.time_unit import RELATIVE_GAP
from fiddler_run.errors import FiddlerError
from fiddler_run.system.files import reason

# Equal experts can be exchanged, which gives many equally good solutions, and the last steps of the
# bound take minutes. So the accepted gap grows with the cube of the elapsed seconds: 0.01% after
# one second, 0.27% after three.
MAX_GAP = 0.004
# Equal ranks can be exchanged, too, and each layer's time is that of one rank's whole blocks.
MAX_GAP_OF_RANKS = 0.01


class Solver(pulp.HiGHS):
    """Ends a long search once the solution is good enough.

    Gaps refer to the objective with its constant, which PuLP drops, and `left_out`.
    """

    def __init__(
        self,
        left_out: float,
        presolve: bool,
        time_limit_s: float | None,
        max_gap: float = MAX_GAP,
        method: str = "choose",
    ):
        super().__init__(
            mip=False,  # PuLP would pass integer variables one by one, in quadratic time
            msg=False,
            gapRel=RELATIVE_GAP,
            timeLimit=time_limit_s,
            callbackTuple=(self._stop_when_close, None),
            callbacksToActivate=[highspy.cb.HighsCallbackType.kCallbackMipInterrupt],
            presolve="choose" if presolve else "off",
            solver=method,
        )
        self._left_out = left_out
        self._max_gap = max_gap

    def run(self, lp: pulp.LpProblem, start: Mapping[pulp.LpVariable, int]) -> str:
        """Solves the program. Returns the status in words.

        Args:
            start: the integer variables of a solution to start from; may be empty.

        Raises:
            FiddlerError: the solver failed.
        """
        self._start = start
        try:
            lp.solve(self)
        except Exception as error:  # HiGHS and PuLP raise many types for numbers out of range
            raise FiddlerError(
                f"the solver failed ({reason(error)}); look for absurd times in the machine profile"
            ) from None
        if lp.sol_status == pulp.LpSolutionIntegerFeasible:
            ended = lp.solverModel.getModelStatus()
            return "stopped early" if ended == highspy.HighsModelStatus.kInterrupt else "time limit"
        if lp.sol_status == pulp.LpSolutionOptimal:
            return "optimal"
        return pulp.LpSolution[lp.sol_status]

    def callSolver(self, lp: pulp.LpProblem) -> None:
        lp.solverModel.changeObjectiveOffset(lp.objective.constant)
        integer = [each.index for each in lp.variables() if each.cat == pulp.LpInteger]
        kinds = np.full(len(integer), int(highspy.HighsVarType.kInteger), np.uint8)
        lp.solverModel.changeColsIntegrality(len(integer), np.array(integer, np.int32), kinds)
        if self._start:
            columns = np.array([each.index for each in self._start], np.int32)
            values = np.array(list(self._start.values()), np.double)
            lp.solverModel.setSolution(len(columns), columns, values)
        super().callSolver(lp)

    def _stop_when_close(self, kind, message, found, answer, _) -> None:
        """A HiGHS callback."""
        if not isfinite(found.mip_primal_bound) or found.running_time <= 1:
            return
        accepted = min(RELATIVE_GAP * found.running_time**3, self._max_gap)
        whole = found.mip_primal_bound + self._left_out
        if found.mip_primal_bound - found.mip_dual_bound <= accepted * whole:
            answer.user_interrupt = True
