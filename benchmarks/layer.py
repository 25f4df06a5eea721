"""Plots what GPU, link and CPU do during consecutive layers, from a trace of fiddler-run.

    fiddler-run --plan PLAN --load-format dummy --bench --trace trace.json
    python benchmarks/layer.py trace.json -o docs/images/layer.png [--layer N]

Layers N to N + 2 of a token in the middle of decode are drawn, those of rank 0.
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

LANES = ("GPU", "link", "CPU")
WAITING = "wait for the router"
COLOURS = {
    "dense": "tab:gray",
    "resident": "tab:blue",
    "in place": "tab:cyan",
    "copy": "tab:cyan",
    "streamed": "tab:purple",
    "blocks": "tab:orange",
    WAITING: "lightgray",
}
LABELS = {
    "dense": "attention, router",
    "in place": "streamed and resident blocks",
    "blocks": "the CPU's blocks",
}


NUM_LAYERS = 3


def main() -> None:
    flags = parse_arguments()
    events = json.loads(Path(flags.trace).read_text())["traceEvents"]
    events = [event for event in events if event["pid"] == 0]
    names = (event for event in events if event["name"] == "thread_name")
    rows = {event["tid"]: event["args"]["name"] for event in names}
    spans = [event for event in events if event["ph"] == "X" and rows[event["tid"]] in LANES]
    calls = sorted({span["args"]["call"] for span in spans if span["args"]["layer"] == flags.layer})
    call = calls[len(calls) // 2]
    starts = [start_us(spans, number) for number in range(call, call + NUM_LAYERS + 1)]
    draw(spans, rows, starts).savefig(flags.output, dpi=120)


def start_us(spans: list[dict], call: int) -> float:
    """When the experts of a call start to work."""
    return min(
        span["ts"]
        for span in spans
        if span["args"]["call"] == call and span["name"] not in (WAITING, "dense", "exchange")
    )


def draw(spans: list[dict], rows: dict[int, str], starts: list[float]):
    """Draws the spans from the first to the last of `starts`, one row per lane."""
    figure, axes = pyplot.subplots(figsize=(9, 2.2), layout="constrained")
    names = {}
    busy_until = dict.fromkeys(LANES, 0.0)
    for span in sorted(spans, key=lambda span: span["ts"] + span["dur"]):
        lane = rows[span["tid"]]
        # A job waits from when it was submitted, while the one before it is still at work.
        left = max(span["ts"], busy_until[lane]) - starts[0]
        right = span["ts"] + span["dur"] - starts[0]
        busy_until[lane] = span["ts"] + span["dur"]
        row = len(LANES) - 1 - LANES.index(lane)
        name = span["name"]
        if right > 0 and left < starts[-1] - starts[0]:
            bar = axes.barh(
                row, (right - left) / 1e3, left=left / 1e3, height=0.7, color=COLOURS.get(name)
            )
            names.setdefault(LABELS.get(name, name), bar)
    for start in starts:
        axes.axvline((start - starts[0]) / 1e3, color="black", linewidth=0.8)
    axes.set(
        xlim=(0, (starts[-1] - starts[0]) / 1e3),
        xlabel="milliseconds; a line is the start of a layer's experts",
    )
    axes.set_yticks(range(len(LANES)), reversed(LANES))
    figure.legend(names.values(), names.keys(), loc="outside upper center", ncols=4, fontsize=8)
    return figure


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trace", metavar="TRACE", help="written by `fiddler-run --trace`")
    parser.add_argument("-o", "--output", metavar="FILE", required=True, help="picture to write")
    parser.add_argument("--layer", type=int, default=3, help="first layer (default: %(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
