"""What differs between two plans of one model: where blocks lie, settings, predictions. Rule: only the plans are looked at."""

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from fiddler_opt.report import table
from fiddler_opt.units import format_bytes
from fiddler_run.errors import FiddlerError
from fiddler_run.plan import Plan

Value = int | float | str | bool | None  # None: this plan has no such key
NOT_SETTINGS = {"version", "model", "stream_share", "resident_blocks", "disk_blocks", "predicted", "bytes_per_s", "provenance"}
PREDICTIONS = {
    "decode_tokens_per_s": ("decode", "{:.2f} tokens/s"),
    "ttft_s": ("time to first token", "{:.3f} s"),
    "gpu_hit_rate": ("GPU hit rate", "{:.1%}"),
    "workload_s": ("prompt and output", "{:.2f} s"),
}
NAMED = 3  # experts in a layer


@dataclass(frozen=True)
class Move:
    """An expert and its number of blocks in GPU memory, which differs."""

    layer: int
    expert: int
    before: int
    after: int

    @property
    def blocks(self) -> int:
        """How many come onto the GPU; negative: how many leave it."""
        return self.after - self.before


@dataclass(frozen=True)
class Change:
    """A value in the first plan and in the second."""

    name: str
    before: Value
    after: Value


@dataclass(frozen=True)
class Comparison:
    """What differs from one plan to another.

    `moves`: of GPU memory; `disk_moves`: how many experts have another number of blocks on disk; `settings`: those that differ;
    `predictions`: equal ones as well, named as in PREDICTIONS; `notes`: why they may not be comparable.
    """

    block_bytes: int
    resident_blocks: Change
    moves: list[Move]
    disk_moves: int
    settings: list[Change]
    predictions: list[Change]
    notes: list[str]

    @property
    def same(self) -> bool:
        return not (self.moves or self.disk_moves or self.settings or any(each.before != each.after for each in self.predictions))


def compare(a: Plan, b: Plan) -> Comparison:
    """What changes from plan `a` to plan `b`.

    Raises:
        FiddlerError: they are of different models, or cut experts into blocks of different sizes.
    """
    _require_comparable(a, b)
    notes, same_work = [], _work(a) == _work(b)
    if not same_work:
        notes.append("the plans are for different workloads, and so are the predictions")
    if a.provenance.machine_sha256 != b.provenance.machine_sha256:
        notes.append("the plans were made from different machine profiles, and so were the predictions")
    before, after = _predictions(a), _predictions(b)
    named = [name for name in before if name != "workload_s" or same_work]
    return Comparison(
        block_bytes=a.block_bytes,
        resident_blocks=Change("resident_blocks", a.num_resident_blocks, b.num_resident_blocks),
        moves=_moves(a, b),
        disk_moves=_disk_moves(a, b),
        settings=_differing(_settings(a), _settings(b)) + _shares(a, b),
        predictions=[Change(name, before[name], after[name]) for name in named],
        notes=notes,
    )


def _require_comparable(a: Plan, b: Plan) -> None:
    for key in type(a.model).model_fields:
        values = [getattr(plan.model, key) for plan in (a, b)]
        # A folder is named relative to each plan: its last part decides.
        if len(set(values)) > 1 and (key != "name" or len({Path(name).name for name in values}) > 1):
            raise FiddlerError(f"plans of different models cannot be compared: model.{key} is {values[0]} and {values[1]}")
    if a.block_neurons != b.block_neurons:
        raise FiddlerError(
            f"plans of different block sizes cannot be compared: block_neurons is {a.block_neurons} and {b.block_neurons}"
        )


def _moves(a: Plan, b: Plan) -> list[Move]:
    return [
        Move(layer, expert, before, after)
        for layer in range(a.model.num_layers)
        for expert, (before, after) in enumerate(zip(a.resident_blocks[layer], b.resident_blocks[layer], strict=True))
        if before != after
    ]


def _disk_moves(a: Plan, b: Plan) -> int:
    none = [0] * a.model.num_experts
    rows = [(a.disk_blocks.get(layer, none), b.disk_blocks.get(layer, none)) for layer in range(a.model.num_layers)]
    return sum(before != after for pair in rows for before, after in zip(*pair, strict=True))


def _settings(plan: Plan) -> dict[str, Value]:
    """All that was chosen or given but the placement, by the names of the file's keys."""
    made = plan.provenance
    settings = {"routing": made.routing, "machine": f"{Path(made.machine).name} ({made.machine_sha256[:8]})"}
    for key, value in plan.model_dump(exclude=NOT_SETTINGS).items():
        settings |= {f"{key}.{name}": each for name, each in value.items()} if isinstance(value, dict) else {key: value}
    return settings


def _differing(before: dict[str, Value], after: dict[str, Value]) -> list[Change]:
    changes = [Change(name, before.get(name), after.get(name)) for name in before | after]
    return [change for change in changes if change.before != change.after]


def _shares(a: Plan, b: Plan) -> list[Change]:
    """Where the plans send another share over the link, at the token counts that either names."""
    tokens = sorted(a.stream_share | b.stream_share)
    before, after = ({f"stream_share[{count}]": round(plan.stream_share_at(count), 4) for count in tokens} for plan in (a, b))
    return _differing(before, after)


def _work(plan: Plan) -> dict[str, int]:
    """What the predictions are for; room for a longer context takes no time."""
    return plan.workload.model_dump(exclude={"max_seq_len"})


def _predictions(plan: Plan) -> dict[str, float]:
    """`workload_s`: seconds for prompt and output; the first token comes with the end of the prompt."""
    workload, predicted = plan.workload, plan.predicted
    later_tokens = (workload.output_tokens - 1) * workload.batch_size
    return {
        "decode_tokens_per_s": predicted.decode_tokens_per_s,
        "ttft_s": predicted.ttft_s,
        "gpu_hit_rate": predicted.gpu_hit_rate,
        "workload_s": predicted.ttft_s + later_tokens / predicted.decode_tokens_per_s,
    }


def print_comparison(console: Console, comparison: Comparison) -> None:
    if comparison.same:
        console.print("the plans are the same: every block, every setting and every prediction")
        return
    _print_moves(console, comparison)
    if comparison.settings:
        settings = table("setting", "first", "second")
        for change in comparison.settings:
            settings.add_row(change.name, *_values(change))
        console.print(settings)
    _print_predictions(console, comparison)
    for note in comparison.notes:
        console.print(f"note: {note}", style="yellow")


def _print_moves(console: Console, comparison: Comparison) -> None:
    resident = comparison.resident_blocks
    onto, off = (f"{blocks} ({format_bytes(blocks * comparison.block_bytes)})" for blocks in _onto_and_off(comparison.moves))
    console.print(f"blocks in GPU memory: {resident.before} -> {resident.after}; {onto} come, {off} go")
    if comparison.disk_moves:
        console.print(f"experts with another number of blocks on disk: {comparison.disk_moves}")
    if not comparison.moves:
        return
    moved = table("layer", "blocks that come", "that go", "experts that change most: blocks")
    for layer in dict.fromkeys(move.layer for move in comparison.moves):
        moves = sorted((move for move in comparison.moves if move.layer == layer), key=lambda move: -abs(move.blocks))
        told = ", ".join(f"{move.expert}: {move.before} -> {move.after}" for move in moves[:NAMED])
        onto, off = _onto_and_off(moves)
        moved.add_row(str(layer), str(onto or "-"), str(off or "-"), told)
    console.print(moved)


def _onto_and_off(moves: list[Move]) -> tuple[int, int]:
    """Blocks."""
    return sum(max(0, move.blocks) for move in moves), sum(max(0, -move.blocks) for move in moves)


def _print_predictions(console: Console, comparison: Comparison) -> None:
    predictions = table("predicted", "first", "second", "change")
    for change in comparison.predictions:
        words, form = PREDICTIONS[change.name]
        if change.before == change.after:
            difference = "same"
        elif change.name == "gpu_hit_rate":
            difference = f"{100 * (change.after - change.before):+.1f} points"
        else:
            difference = f"{change.after / change.before - 1:+.1%}"
        predictions.add_row(words, form.format(change.before), form.format(change.after), difference)
    console.print(predictions)


def _values(change: Change) -> list[str]:
    """In words; bytes exactly where they would read the same."""
    values = [change.before, change.after]
    if change.name.partition(".")[0].endswith("_bytes") and None not in values:
        sizes = [format_bytes(value) for value in values]
        return sizes if sizes[0] != sizes[1] else [f"{value:,} B" for value in values]
    if change.name.startswith("stream_share"):
        return [f"{value:.1%}" for value in values]
    return ["-" if value is None else str(value) for value in values]
