"""Records what happened when, by lane. Off by default, because marking GPU work costs time."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

import torch

from fiddler_run.system.files import write_whole


class Lane(StrEnum):
    """Where work is done; a row of the trace. `PYTHON` is the thread that queues the work."""

    PYTHON = "Python"
    CPU = "CPU"
    LINK = "link"
    GPU = "GPU"


ON_DEVICE = (Lane.LINK, Lane.GPU)


class Work(StrEnum):
    """The names of spans."""

    DENSE = "dense"  # GPU: everything between two layers' experts
    RESIDENT = "resident"  # GPU: resident blocks
    STREAMED = "streamed"  # GPU: blocks that have arrived
    COPY = "copy"  # link: blocks to the staging ring
    IN_PLACE = "in place"  # link: one kernel reads streamed blocks, then resident blocks
    BLOCKS = "blocks"  # CPU: its blocks
    ROUTER = "wait for the router"  # Python or CPU
    QUEUE = "queue device work"  # Python
    HELP = "help the CPU"  # Python
    EXCHANGE = "exchange"  # GPU: until rank 0 has all sums, or another rank the next layer's states


@dataclass(frozen=True)
class Span:
    """A span of time, in seconds since the timeline's start. `call` numbers the calls of layers."""

    lane: str
    name: str
    layer: int
    call: int
    start_s: float
    stop_s: float

    def later(self, seconds: float) -> Span:
        return replace(self, start_s=self.start_s + seconds, stop_s=self.stop_s + seconds)


Place = tuple[int, int]  # a layer, and the number of the call


class Timeline:
    """The spans of one model's layers, if recorded.

    `origin_s` is the start of the current or last recording, by `time.perf_counter`.
    """

    def __init__(self, device: torch.device):
        self._layer = 0
        self._call = 0
        self._events = device.type == "cuda"
        self._marks: list[tuple] | None = None
        self._begun: dict[tuple[str, str], object] = {}
        self.origin_s = 0.0

    @contextmanager
    def recording(self) -> Iterator[list[Span]]:
        """Records spans inside the context. The yielded list is filled when the context is left.

        Recording always ends with the context.
        """
        spans: list[Span] = []
        self.start()
        try:
            yield spans
        finally:
            spans += self.stop()

    def start(self) -> None:
        self._marks = []
        self._begun = {}
        self._call = -1
        if self._events:
            torch.cuda.synchronize()
            self._origin = self._event()
            self._origin.synchronize()
        self.origin_s = time.perf_counter()

    def stop(self) -> list[Span]:
        """Ends the recording, if there is one. Returns its spans."""
        marks = self._marks or []
        self._marks = None  # first, because the rest can fail
        if self._events:
            torch.cuda.synchronize()
        return [
            Span(*where, self._seconds(begun), self._seconds(ended))
            for *where, begun, ended in marks
        ]

    def enter(self, layer: int) -> None:
        """Assigns the following spans to a call of this layer."""
        self._layer = layer
        self._call = self._call + 1

    def begin(self, lane: str, name: str) -> None:
        if self._marks is not None:
            self._begun[lane, name] = self._layer, self._call, self._now(lane)

    def end(self, lane: str, name: str) -> None:
        """Ends the current span. Without a current span, does nothing."""
        if self._marks is not None and (lane, name) in self._begun:
            ended = self._now(lane)
            layer, call, begun = self._begun.pop((lane, name))
            self._marks.append((lane, name, layer, call, begun, ended))

    def drop(self, lane: str, name: str) -> None:
        """Forgets the current span."""
        self._begun.pop((lane, name), None)

    @property
    def on(self) -> bool:
        return self._marks is not None

    @property
    def place(self) -> Place:
        """The current call."""
        return self._layer, self._call

    def add(self, lane: str, name: str, place: Place, begun_s: float, ended_s: float) -> None:
        """Adds a finished span of work outside the device. Times are from `time.perf_counter`."""
        if self._marks is not None:
            self._marks.append((lane, name, *place, begun_s, ended_s))

    def _now(self, lane: str) -> object:
        return self._event() if self._events and lane in ON_DEVICE else time.perf_counter()

    def _event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, mark: object) -> float:
        return (
            mark - self.origin_s
            if isinstance(mark, float)
            else self._origin.elapsed_time(mark) * 1e-3
        )


def whole_s(spans: list[Span]) -> float:
    """Seconds from the first start to the last end. 0 without spans."""
    return (
        max(span.stop_s for span in spans) - min(span.start_s for span in spans) if spans else 0.0
    )


def write_trace(spans: list[list[Span]], path: Path) -> None:
    """Writes a trace for chrome://tracing and ui.perfetto.dev, with one row per lane of each rank.

    Args:
        spans: of each rank.

    Raises:
        FiddlerError: the file cannot be written.
    """
    names = [
        {"ph": "M", "name": "thread_name", "pid": rank, "tid": row, "args": {"name": lane}}
        for rank in range(len(spans))
        for row, lane in enumerate(Lane)
    ]
    names += [
        {"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"rank {rank}"}}
        for rank in range(len(spans))
    ]
    events = [
        {
            "ph": "X",
            "name": span.name,
            "pid": rank,
            "tid": [*Lane].index(span.lane),
            "ts": span.start_s * 1e6,
            "dur": (span.stop_s - span.start_s) * 1e6,
            "args": {"layer": span.layer, "call": span.call},
        }
        for rank, of_rank in enumerate(spans)
        for span in of_rank
    ]
    write_whole(path, json.dumps({"traceEvents": names + events}))
