"""The differences between two plans of one model: placement, settings, predictions.

Only the plans are read.
"""

from dataclasses import dataclass
from math import gcd
from pathlib import Path

from fiddler_opt.inputs.machine_ranks import JOINED_BY
from fiddler_opt.solve.predict import workload_s
from fiddler_run.errors import FiddlerError
from fiddler_run.plan.schema import Plan

Value = int | float | str | bool | None  # None: the plan has no such key
# Keys that are compared in other ways, or that record how a plan was made.
NOT_SETTINGS = {"version", "model", "ranks", "predicted", "bytes_per_s", "provenance"}
NOT_RANK_SETTINGS = {"stream_share", "resident_blocks", "host_blocks", "disk_blocks"}


@dataclass(frozen=True)
class Move:
    """An expert whose number of blocks in GPU memory differs."""

    layer: int
    expert: int
    before: int
    after: int

    @property
    def blocks(self) -> int:
        """Number of blocks added to GPU memory; negative if removed."""
        return self.after - self.before


@dataclass(frozen=True)
class Change:
    """A value in the first plan and in the second."""

    name: str
    before: Value
    after: Value


@dataclass(frozen=True)
class Comparison:
    """The differences from one plan to another.

    `moves` lists the experts whose number of blocks in GPU memory changes; `disk_moves` counts
    those whose number on disk does, `rank_moves` those whose number in a rank does. Blocks of
    different sizes are counted in the largest size that divides both. `settings`
    lists those that differ; `predictions` lists all. `notes` say why predictions may not be
    comparable.
    """

    block_bytes: int
    resident_blocks: Change
    moves: list[Move]
    disk_moves: int
    rank_moves: int
    settings: list[Change]
    predictions: list[Change]
    notes: list[str]

    @property
    def same(self) -> bool:
        return not (
            self.moves
            or self.disk_moves
            or self.rank_moves
            or self.settings
            or any(each.before != each.after for each in self.predictions)
        )


def compare(a: Plan, b: Plan) -> Comparison:
    """The changes from plan `a` to plan `b`.

    Raises:
        FiddlerError: the plans are of different models.
    """
    _require_same_model(a, b)
    notes = []
    neurons = gcd(a.block_neurons, b.block_neurons)
    if a.block_neurons != b.block_neurons:
        notes.append(f"blocks of different sizes are counted in blocks of {neurons} neurons")
    resident = [_counted(plan.resident_rows(), plan, neurons) for plan in (a, b)]
    same_work = _work(a) == _work(b)
    if not same_work:
        notes.append("the plans are for different workloads, and so are the predictions")
    if a.provenance.machine_sha256 != b.provenance.machine_sha256:
        notes.append(
            "the plans were made from different machine profiles, and so were the predictions"
        )
    before = _predictions(a)
    after = _predictions(b)
    named = [name for name in before if name != "workload_s" or same_work]
    return Comparison(
        block_bytes=a.block_bytes * neurons // a.block_neurons,
        resident_blocks=Change("resident_blocks", *(sum(map(sum, rows)) for rows in resident)),
        moves=_moves(*resident),
        disk_moves=_disk_moves(a, b, neurons),
        rank_moves=_rank_moves(a, b, neurons),
        settings=_differing(_settings(a), _settings(b)) + _shares(a, b),
        predictions=[Change(name, before[name], after[name]) for name in named],
        notes=notes,
    )


def _require_same_model(a: Plan, b: Plan) -> None:
    for key in type(a.model).model_fields:
        values = [getattr(plan.model, key) for plan in (a, b)]
        # Folders are named relative to each plan, so only the last part is compared.
        if len(set(values)) > 1 and (
            key != "name" or len({Path(name).name for name in values}) > 1
        ):
            raise FiddlerError(
                f"plans of different models cannot be compared: model.{key} is {values[0]} and"
                f" {values[1]}"
            )


def _counted(rows: list[list[int]], plan: Plan, neurons: int) -> list[list[int]]:
    """Numbers of a plan's blocks as numbers of blocks of `neurons`, without padding."""
    factor = plan.block_neurons // neurons
    most = -(-plan.model.intermediate_size // neurons)
    return [[min(count * factor, most) for count in row] for row in rows]


def _moves(before: list[list[int]], after: list[list[int]]) -> list[Move]:
    return [
        Move(layer, expert, *counts)
        for layer, rows in enumerate(zip(before, after, strict=True))
        for expert, counts in enumerate(zip(*rows, strict=True))
        if counts[0] != counts[1]
    ]


def _disk_moves(a: Plan, b: Plan, neurons: int) -> int:
    none = [0] * a.model.num_experts
    layers = range(a.model.num_layers)
    before, after = (
        _counted([plan.rank.disk_blocks.get(layer, none) for layer in layers], plan, neurons)
        for plan in (a, b)
    )
    return len(_moves(before, after))


def _rank_moves(a: Plan, b: Plan, neurons: int) -> int:
    """The experts of which a rank has other blocks. 0 unless both plans have as many ranks, at
    least two.
    """
    if len(a.ranks) != len(b.ranks) or len(a.ranks) == 1:
        return 0
    return sum(
        before != after
        for layer in range(a.model.num_layers)
        for before, after in zip(
            *(_parts_by_expert(plan, layer, neurons) for plan in (a, b)), strict=True
        )
    )


def _parts_by_expert(plan: Plan, layer: int, neurons: int) -> list[tuple[list[int], ...]]:
    """For each expert, the blocks of each rank: in its GPU memory and in its host memory."""
    parts = (plan.parts_of(number, layer) for number in range(len(plan.ranks)))
    rows = ([[part.resident, part.host] for part in of_rank] for of_rank in parts)
    return list(zip(*(_counted(each, plan, neurons) for each in rows), strict=True))


def _settings(plan: Plan) -> dict[str, Value]:
    """All chosen and given values except the placement, by the file's keys."""
    made = plan.provenance
    settings = {
        "routing": made.routing,
        "machine": f"{_machine_names(plan)} ({made.machine_sha256[:8]})",
        "network": made.network or None,
        "ranks": len(plan.ranks),
    }
    chosen = plan.model_dump(exclude=NOT_SETTINGS)
    chosen["budget"].pop("other_gpu_bytes", None)  # the same as the ranks' gpu_memory_bytes.total
    for number, rank in enumerate(plan.ranks):
        of_rank = f"ranks[{number}]." if number else ""
        values = rank.model_dump(exclude=NOT_RANK_SETTINGS)
        chosen |= {f"{of_rank}{key}": value for key, value in values.items()}
    for key, value in chosen.items():
        if isinstance(value, dict):
            settings |= {f"{key}.{name}": each for name, each in value.items()}
        else:
            settings[key] = value
    return settings


def _machine_names(plan: Plan) -> str:
    names = plan.provenance.machine.split(JOINED_BY)
    return JOINED_BY.join(Path(name).name for name in names)


def _differing(before: dict[str, Value], after: dict[str, Value]) -> list[Change]:
    changes = [Change(name, before.get(name), after.get(name)) for name in before | after]
    return [change for change in changes if change.before != change.after]


def _shares(a: Plan, b: Plan) -> list[Change]:
    """The stream shares of the ranks of both plans that differ, at the token counts of either."""
    changes = []
    for number, ranks in enumerate(zip(a.ranks, b.ranks, strict=False)):
        of_rank = f"ranks[{number}]." if number else ""
        tokens = sorted({count for rank in ranks for count in rank.stream_share})
        before, after = (
            {
                f"{of_rank}stream_share[{count}]": round(rank.stream_share_at(count), 4)
                for count in tokens
            }
            for rank in ranks
        )
        changes += _differing(before, after)
    return changes


def _work(plan: Plan) -> dict[str, int]:
    """The predicted work. The context is left out, because room for it takes no time."""
    return plan.workload.model_dump(exclude={"max_seq_len"})


def _predictions(plan: Plan) -> dict[str, float]:
    predicted = plan.predicted
    return {
        "decode_tokens_per_s": predicted.decode_tokens_per_s,
        "ttft_s": predicted.ttft_s,
        "gpu_hit_rate": predicted.gpu_hit_rate,
        "workload_s": workload_s(plan),
    }
