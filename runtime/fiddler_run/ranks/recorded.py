"""A rank's part of each layer as one CUDA graph: inputs of rank 0, experts, partial sums.

Launching the kernels one by one takes longer than computing small experts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

from fiddler_run.engine.cuda_graphs import (
    Capture,
    Graphs,
    no_garbage_collection,
    on_capture_stream,
)
from fiddler_run.engine.layer import ExpertsLayer
from fiddler_run.ranks.exchange import Exchange, Sizes
from fiddler_run.system.files import reason

MAX_SIZES = 4  # of batches; recordings take memory, some of it from the driver


class Recorded(NamedTuple):
    """A captured layer, and what to call before and after it is launched."""

    before: Callable[[], None]
    capture: Capture
    after: Callable[[], None]


class RecordedLayers:
    """Records each layer at its first batch of a size that rank 0 has recorded."""

    def __init__(
        self,
        layers: Sequence[ExpertsLayer],
        exchange: Exchange,
        make_capture: Callable[[], Capture] | None = None,
    ):
        """Prepares the layers.

        Args:
            make_capture: how to capture. None: as CUDA graphs.
        """
        self._layers = layers
        self._exchange = exchange
        self._make_capture = make_capture
        self._by_sizes: dict[Sizes, dict[int, Recorded]] = {}
        self._failed = False

    def run(self, number: int, sizes: Sizes) -> bool:
        """Receives the inputs of layer `number`, computes this rank's share, and sends it.

        Returns:
            False, with nothing done, if the layer cannot be recorded.
        """
        layer = self._layers[number]
        if self._failed or not (self._exchange.can_record and layer.can_record(sizes.tokens)):
            return False
        layer.begin_step()
        recorded = self._of_sizes(sizes)
        if number not in recorded:
            return self._record(number, sizes)
        recorded[number].before()
        recorded[number].capture.replay()
        recorded[number].after()
        return True

    def _of_sizes(self, sizes: Sizes) -> dict[int, Recorded]:
        if sizes not in self._by_sizes and len(self._by_sizes) == MAX_SIZES:
            del self._by_sizes[next(iter(self._by_sizes))]
        return self._by_sizes.setdefault(sizes, {})

    def _record(self, number: int, sizes: Sizes) -> bool:
        """Records a layer, and runs it for the first time. False if that fails."""
        self._make_capture = self._make_capture or Graphs()
        capture = self._make_capture()
        with on_capture_stream(self._exchange.device), no_garbage_collection():
            try:
                capture.begin()
                inputs = self._exchange.receive(sizes)
                partial, before, after = self._layers[number].record(1, *inputs)
                self._exchange.send(partial)
            except Exception as error:  # PyTorch, NCCL and Triton raise many types
                capture.abort()
                self._failed = True
                logging.getLogger("fiddler_run").warning(
                    "no CUDA graphs in another rank; decode will be slower (%s)", reason(error)
                )
                return False
            before()
            capture.end()
            after()
        self._by_sizes[sizes][number] = Recorded(before, capture, after)
        return True
