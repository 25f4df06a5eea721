"""The variables of the integer program: blocks by rank, place, layer and group of equal experts."""

from collections.abc import Sequence

import pulp

from fiddler_opt.solve.cost import CostModel
from fiddler_opt.solve.equal import spread_places
from fiddler_opt.solve.placement import MemoryLimits, Placement, Share
from fiddler_opt.solve.rounding import whole_blocks, within_gpu_memory
from fiddler_opt.solve.scenarios import Scenario

Variables = list[dict[int, pulp.LpVariable]]  # by layer and the first expert of a group
Side = pulp.LpAffineExpression


class BlockVariables:
    """`r`, `h` and `d` of the program.

    `r`, `d`: those of rank 0; `d` is empty without a limit on its host memory. `others`: `r` and
    `h` of each further rank.
    """

    def __init__(
        self,
        cost: CostModel,
        groups: Sequence[list[list[int]]],
        limits: MemoryLimits,
        category: str,
    ):
        """Makes the variables.

        Args:
            groups: by layer, the groups of equal experts.
            category: PuLP's; integer or continuous.
        """
        self._cost = cost
        self._groups = groups
        self._category = category
        limited = limits.host_bytes is not None
        self.r = self._make("r")
        self.d = self._make("d") if limited else [{} for _ in groups]
        self.others = [
            (self._make(f"r{number}"), self._make(f"h{number}"))
            for number in range(1, len(limits.ranks))
        ]

    def _make(self, name: str) -> Variables:
        blocks = self._cost.blocks_per_expert
        return [
            {
                experts[0]: pulp.LpVariable(
                    f"{name}_{layer}_{experts[0]}", 0, blocks * len(experts), self._category
                )
                for experts in groups
            }
            for layer, groups in enumerate(self._groups)
        ]

    @property
    def resident(self) -> list[Variables]:
        """`r` by rank."""
        return [self.r, *(r for r, _ in self.others)]

    @property
    def _places(self) -> list[Variables]:
        """All variables. The blocks that they leave are in the host memory of rank 0."""
        return [self.r, self.d, *(place for share in self.others for place in share)]

    def elsewhere(self) -> list[tuple[pulp.LpVariable, Side]]:
        """For each group, its `r` and the sum of its blocks outside the host memory of rank 0."""
        return [
            (r, pulp.lpSum(place[layer][expert] for place in self._places if place[layer]))
            for layer, row in enumerate(self.r)
            for expert, r in row.items()
        ]

    @property
    def are_solved(self) -> bool:
        return all(
            each.varValue is not None
            for place in self._places
            for row in place
            for each in row.values()
        )

    def placement(self) -> Placement:
        """The placement in the solution of the integer program."""
        return self._placement([[round(count) for count in counts] for counts in self._solved()])

    def rounded(self, limits: MemoryLimits) -> Placement:
        """A placement close to the solution of the relaxation, within the limits of GPU memory."""
        sizes = [r.upBound for row in self.r for r in row.values()]
        placement = self._placement(whole_blocks(self._solved(), sizes))
        return within_gpu_memory(placement, self._cost, limits)

    def values(self, placement: Placement) -> dict[pulp.LpVariable, int]:
        """The values of the variables for a placement."""
        shares = [rows for each in placement.others for rows in (each.resident, each.host)]
        rows = [placement.resident, placement.on_disk, *shares]
        return {
            place[layer][experts[0]]: sum(counts[layer][expert] for expert in experts)
            for place, counts in zip(self._places, rows, strict=True)
            for layer, groups in enumerate(self._groups)
            for experts in groups
            if place[layer]
        }

    def _solved(self) -> list[list[float]]:
        """The solution: by group, the blocks in each place."""
        return [
            [place[layer][expert].varValue if place[layer] else 0 for place in self._places]
            for layer, row in enumerate(self.r)
            for expert in row
        ]

    def _placement(self, counts: list[list[int]]) -> Placement:
        """The placement for the blocks of each group in each place."""
        rows = [[[0] * len(row) for row in self._cost.called] for _ in self._places]
        members = ((layer, each) for layer, groups in enumerate(self._groups) for each in groups)
        for (layer, experts), group in zip(members, counts, strict=True):
            for place, blocks in zip(rows, spread_places(group, len(experts)), strict=True):
                for expert, count in zip(experts, blocks, strict=True):
                    place[layer][expert] = count
        resident, on_disk, *shares = rows
        return Placement(resident, on_disk, tuple(map(Share, shares[::2], shares[1::2])))

    def right_sides(self, scenario: Scenario, layer: int, unit: float) -> list[tuple[Side, Side]]:
        """The right sides of (A) and (B) for each rank.

        Args:
            unit: of the program's times, per second.
        """
        per_block = unit / self._cost.blocks_per_expert
        shares = [(r[layer], h[layer]) for r, h in self.others]
        sides = [self._first_sides(scenario, layer, unit)]
        for share, rank in zip(shares, scenario.ranks[1:], strict=True):
            resident, host = (
                Side([(place[e], per_block * s) for e, s in whole_s.items() if e in place])
                for place, whole_s in zip(share, (rank.resident_s, rank.host_s), strict=True)
            )
            sides.append((resident, host))
        return sides

    def _first_sides(self, scenario: Scenario, layer: int, unit: float) -> tuple[Side, Side]:
        """The right sides for rank 0, whose host blocks are those that the variables leave."""
        per_block = unit / self._cost.blocks_per_expert
        first = scenario.ranks[0]
        r = self.r[layer]
        d = self.d[layer]
        not_on_disk = [place[layer] for place in self._places if place is not self.d]
        resident = [(r[e], per_block * s) for e, s in first.resident_s.items() if e in r]
        host = [
            (place[e], -per_block * s)
            for e, s in first.host_s.items()
            if e in r
            for place in not_on_disk
        ]
        host += [
            (d[e], per_block * (first.disk_s[e] - s)) for e, s in first.host_s.items() if e in d
        ]
        all_in_host = unit * sum(first.host_s.values())
        return Side(resident), Side(host, all_in_host)


def total(variables: Variables) -> Side:
    return pulp.lpSum(each for row in variables for each in row.values())
