"""Prints and plots what cache policies would do with recorded routing."""

from pathlib import Path

from rich.console import Console

from fiddler_opt.insight.plots import require_matplotlib, save
from fiddler_opt.insight.replay import HINDSIGHT, OPTIMUM, PLANNED, Replayed
from fiddler_opt.insight.table import table
from fiddler_opt.units import format_bytes

WORTHWHILE = 0.02  # a placement gains about as much on its own trace by chance


def print_replay(console: Console, found: dict[str, Replayed]) -> None:
    """Prints a row for each policy, and what they mean."""
    prefill = found[PLANNED].prefill_hit_rate is not None
    columns = ("hit rate", *(["in prefill"] if prefill else []), "copied", "tokens/s")
    shown = table("resident blocks", *columns, "with free copies")
    for words, each in found.items():
        shown.add_row(
            words,
            f"{each.hit_rate:.1%}",
            *([f"{each.prefill_hit_rate:.1%}"] if prefill else []),
            format_bytes(each.copied_bytes) if each.copied_bytes else "-",
            f"{each.tokens_per_s:.2f}",
            f"{each.free_copies_tokens_per_s:.2f}",
        )
    console.print(shown)
    console.print(
        "hit rate and copies, which take the link, are those of decode; all hold the same number"
        " of blocks, and the optimum knows the future"
    )
    console.print(verdict(found))


def verdict(found: dict[str, Replayed]) -> str:
    """What the result means, in one line."""

    def gain(words: str) -> float:
        return found[words].tokens_per_s / found[PLANNED].tokens_per_s - 1

    dynamic = [words for words in found if words not in (PLANNED, HINDSIGHT, OPTIMUM)]
    best = max(dynamic, key=gain)
    bound = found[OPTIMUM].free_copies_tokens_per_s / found[PLANNED].tokens_per_s - 1
    most = f"an optimal cache with free copies would gain {bound:+.1%}"
    again = "record a routing profile from it, and plan again"
    if max(gain(best), gain(HINDSIGHT)) < WORTHWHILE:
        return (
            f"a dynamic cache would not pay here: the best ({best}) changes tokens/s by"
            f" {gain(best):+.1%}; {most}"
        )
    if gain(HINDSIGHT) >= gain(best):
        return (
            f"a fixed placement made for this routing would gain {gain(HINDSIGHT):+.1%}, more than"
            f" the best dynamic cache ({best}, {gain(best):+.1%}): {again}; {most}"
        )
    return (
        f"a dynamic cache would pay here: the best ({best}) gains {gain(best):+.1%} tokens/s, and a"
        f" fixed placement made for this routing {gain(HINDSIGHT):+.1%}; {most}"
    )


def plot_replay(found: dict[str, Replayed], title: str, path: str | Path) -> None:
    """Plots hit rates on the left and tokens/s on the right.

    Raises:
        FiddlerError: matplotlib is not installed or does not support the format, or the file cannot
            be written.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1.2 + 0.4 * len(found)), layout="constrained")
    rates = {
        "decode hit rate, %": [100 * each.hit_rate for each in found.values()],
        "decode, tokens/s": [each.tokens_per_s for each in found.values()],
    }
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (name, values), color in zip(panels, rates.items(), ("C0", "C1"), strict=True):
        axes.bar_label(axes.barh(list(found), values, color=color), fmt="%.3g", padding=3)
        axes.set(xlabel=name, xlim=(0, 1.15 * max(*values, 1e-9)))
    panels[0].invert_yaxis()  # both, which share it
    figure.suptitle(title, fontsize="medium", wrap=True)
    save(figure, path)
