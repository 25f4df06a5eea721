"""Plots what GPU, link and CPU do during one layer, from a trace of fiddler-run.

    fiddler-run --plan PLAN --load-format dummy --bench --trace trace.json
    python benchmarks/layer.py trace.json -o docs/images/layer.png [--layer N]

The layer is taken from the middle of decode and drawn together with the start of the next one.
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

LANES = ("GPU", "link", "CPU")
COLOURS = {
    "dense": "tab:gray",
    "resident": "tab:blue",
    "in place": "tab:cyan",
    "copy": "tab:cyan",
    "streamed": "tab:purple",
    "blocks": "tab:orange",
    "wait for the router": "lightgray",
}
LABELS = {
    "dense": "attention, router",
    "in place": "streamed and resident blocks",
    "blocks": "the CPU's blocks",
}


def main() -> None:
    flags = parse_arguments()
    events = json.loads(Path(flags.trace).read_text())["traceEvents"]
    rows = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    spans = [event for event in events if event["ph"] == "X" and rows[event["tid"]] in LANES]
    calls = sorted({event["args"]["call"] for event in spans if in_layer(event, flags.layer)})
    call = calls[len(calls) // 2]
    shown = [event for event in spans if event["args"]["call"] in (call, call + 1)]
    figure = draw(shown, rows, first_us(shown, call), first_us(shown, call + 1))
    figure.savefig(flags.output, dpi=120)


def in_layer(event: dict, layer: int) -> bool:
    return event["args"]["layer"] == layer


def first_us(spans: list[dict], call: int) -> float:
    """When the first span of a call starts."""
    return min(event["ts"] for event in spans if event["args"]["call"] == call)


def draw(spans: list[dict], rows: dict[int, str], start_us: float, stop_us: float):
    """Draws the spans from `start_us` to a little after `stop_us`, one row per lane."""
    figure, axes = pyplot.subplots(figsize=(9, 2.2), layout="constrained")
    names = {}
    for event in spans:
        name = event["name"]
        left = (event["ts"] - start_us) / 1e3
        row = len(LANES) - 1 - LANES.index(rows[event["tid"]])
        bar = axes.barh(row, event["dur"] / 1e3, left=left, height=0.7, color=COLOURS.get(name))
        names.setdefault(LABELS.get(name, name), bar)
    end_ms = 1.15 * (stop_us - start_us) / 1e3
    axes.axvline((stop_us - start_us) / 1e3, color="black", linewidth=0.8)
    axes.set(xlim=(0, end_ms), xlabel="milliseconds; the line is the start of the next layer")
    axes.set_yticks(range(len(LANES)), reversed(LANES))
    figure.legend(names.values(), names.keys(), loc="outside upper center", ncols=4, fontsize=8)
    return figure


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trace", metavar="TRACE", help="written by `fiddler-run --trace`")
    parser.add_argument("-o", "--output", metavar="FILE", required=True, help="picture to write")
    parser.add_argument("--layer", type=int, default=3, help="default: %(default)s")
    return parser.parse_args()


if __name__ == "__main__":
    main()
