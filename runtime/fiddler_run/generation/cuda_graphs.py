"""Records repeated GPU work as CUDA graphs, which the host replays with a single launch."""

import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import cache

import torch
from torch import Tensor

from fiddler_run.system.files import reason

TOLERANCE = 1e-2  # of a replay, relative; other algorithms round differently
WARM_UP_CALLS = 2  # libraries initialise themselves in the first
MAX_SHAPES = 4  # recordings take memory, some of it from the driver
# otherwise other threads' work on the same stream would be recorded too
RECORDING = threading.Lock()


class Recorder:
    """Makes segments: callables on tensors that are recorded at their first call with a shape.

    Only a GPU records, and only the first few shapes. A segment's next call overwrites its results.
    If any recording fails or replays something else, all segments run unrecorded, after one
    warning.
    """

    def __init__(self, device: torch.device):
        self.active = device.type == "cuda"
        self.pool = torch.cuda.graph_pool_handle() if self.active else None
        self.stream = _stream(device) if self.active else None
        # addresses of recordings' inputs and outputs, which never change
        self.kept: set[int] = set()

    def segment(
        self, run: Callable[..., tuple[Tensor, ...] | Tensor]
    ) -> Callable[..., tuple[Tensor, ...] | Tensor]:
        return _Segment(run, self) if self.active else run

    def give_up(self, error: Exception) -> None:
        self.active = False
        logging.getLogger("fiddler_run").warning(
            "no CUDA graphs; decode will be slower (%s)", reason(error)
        )


class _Segment:
    def __init__(self, run: Callable, recorder: Recorder):
        self._run = run
        self._recorder = recorder
        self._recordings: dict[tuple[torch.Size, ...], _Recording] = {}  # by the inputs' shapes

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...] | Tensor:
        if not self._recorder.active:
            return self._run(*inputs)
        shapes = tuple(tensor.shape for tensor in inputs)
        if shapes not in self._recordings:
            if len(self._recordings) == MAX_SHAPES:
                return self._run(*inputs)
            try:
                self._recordings[shapes] = _Recording(self._run, inputs, self._recorder)
            except RuntimeError as error:
                self._recorder.give_up(error)
                return self._run(*inputs)
        return self._recordings[shapes](*inputs)


class _Recording:
    def __init__(self, run: Callable, inputs: tuple[Tensor, ...], recorder: Recorder):
        # Tensors made in inference mode cannot be written to outside it.
        with RECORDING, torch.inference_mode(False), torch.no_grad():
            self._inputs = [
                tensor if tensor.data_ptr() in recorder.kept else tensor.clone()
                for tensor in inputs
            ]
            recorder.stream.wait_stream(torch.cuda.current_stream())
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.stream(recorder.stream):
                for _ in range(WARM_UP_CALLS):
                    expected = run(*self._inputs)
                recorder.stream.synchronize()
                self._graph.capture_begin(recorder.pool, capture_error_mode="thread_local")
                try:
                    self._outputs = run(*self._inputs)
                finally:
                    _end_capture(self._graph, recorder)
            torch.cuda.current_stream().wait_stream(recorder.stream)
        for got, want in zip(_tensors(self(*inputs)), _tensors(expected), strict=True):
            if got.is_floating_point() and not (got - want).norm() <= TOLERANCE * want.norm():
                raise RuntimeError("a replay differs from its recording")
        recorder.kept.update(
            tensor.data_ptr() for tensor in (*self._inputs, *_tensors(self._outputs))
        )

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...] | Tensor:
        for own, given in zip(self._inputs, inputs, strict=True):
            if own.data_ptr() != given.data_ptr():
                own.copy_(given)
        self._graph.replay()
        return self._outputs


def _end_capture(graph: torch.cuda.CUDAGraph, recorder: Recorder) -> None:
    """Ends a capture, including the allocator's part if the capture failed.

    PyTorch omits the latter, after which the allocator would never free cached memory again.
    """
    try:
        graph.capture_end()
    except RuntimeError:
        with suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(recorder.stream.device.index, recorder.pool)
        raise


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One stream for all models: cuBLAS keeps up to 32 MiB for each stream it was used on."""
    return torch.cuda.Stream(device)


def _tensors(outputs: tuple[Tensor, ...] | Tensor) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else outputs
