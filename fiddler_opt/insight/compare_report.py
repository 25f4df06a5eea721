"""Prints a comparison of two plans in the terminal."""

from rich.console import Console

from fiddler_opt.insight.compare import Change, Comparison, Move
from fiddler_opt.insight.table import table
from fiddler_opt.units import format_bytes

PREDICTIONS = {
    "decode_tokens_per_s": ("decode", "{:.2f} tokens/s"),
    "ttft_s": ("time to first token", "{:.3f} s"),
    "gpu_hit_rate": ("GPU hit rate", "{:.1%}"),
    "workload_s": ("prompt and output", "{:.2f} s"),
}
MAX_NAMED = 3  # experts named per layer


def print_comparison(console: Console, comparison: Comparison) -> None:
    """Prints the differences between two plans, or that there are none."""
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
    onto, off = (
        f"{blocks} ({format_bytes(blocks * comparison.block_bytes)})"
        for blocks in _onto_and_off(comparison.moves)
    )
    console.print(
        f"blocks in GPU memory: {resident.before} -> {resident.after}; {onto} added, {off} removed"
    )
    if comparison.disk_moves:
        console.print(f"experts whose number of blocks on disk differs: {comparison.disk_moves}")
    if comparison.rank_moves:
        console.print(f"experts whose division between ranks differs: {comparison.rank_moves}")
    if not comparison.moves:
        return
    moved = table("layer", "blocks added", "removed", "largest changes (expert: blocks)")
    for layer in dict.fromkeys(move.layer for move in comparison.moves):
        moves = sorted(
            (move for move in comparison.moves if move.layer == layer),
            key=lambda move: -abs(move.blocks),
        )
        named = ", ".join(
            f"{move.expert}: {move.before} -> {move.after}" for move in moves[:MAX_NAMED]
        )
        onto, off = _onto_and_off(moves)
        moved.add_row(str(layer), str(onto or "-"), str(off or "-"), named)
    console.print(moved)


def _onto_and_off(moves: list[Move]) -> tuple[int, int]:
    """Blocks added to GPU memory and blocks removed from it."""
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
        predictions.add_row(
            words, form.format(change.before), form.format(change.after), difference
        )
    console.print(predictions)


def _values(change: Change) -> list[str]:
    """The values of a change as text, in full bytes if the rounded sizes look equal."""
    values = [change.before, change.after]
    in_bytes = any(key.endswith("_bytes") for key in change.name.split("."))
    if in_bytes:
        sizes = ["-" if value is None else format_bytes(value) for value in values]
        return sizes if sizes[0] != sizes[1] else [f"{value:,} B" for value in values]
    if "stream_share[" in change.name:
        return [f"{value:.1%}" for value in values]
    return ["-" if value is None else str(value) for value in values]
