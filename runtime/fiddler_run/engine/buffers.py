"""Page-locked host memory that carries activations to the CPU and results back."""

from collections.abc import Callable

import numpy as np
import torch

from fiddler_run.kernels.block_table import table_size
from fiddler_run.kernels.decode_layer import DecodeInputs
from fiddler_run.kernels.limits import MAX_DECODE_TOKENS


class PinnedBuffers:
    """Buffers that the layers of a model use in turn, and flags between GPU and CPU.

    A flag holds the number of a CPU job. Each scalar flag has its own cache line. `output_ready` is
    the last finished job. `gave_up` is the last job that the GPU stopped waiting for, or 0.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._on_gpu = device.type == "cuda"
        self._buffers: dict[str, torch.Tensor] = {}
        flags = torch.zeros(
            (4 + MAX_DECODE_TOKENS // 8, 8), dtype=torch.int64, pin_memory=self._on_gpu
        )
        self.output_ready = flags[0, :1]
        self.gave_up = flags[2, :1]
        self._table_ready = flags[1, :1]
        self._timed_out = flags[3, :1]
        self._inputs_ready = flags[4:].flatten()

    def receive(
        self,
        states: torch.Tensor,
        index: torch.Tensor,
        weights: torch.Tensor,
        meanwhile: Callable[[], None],
    ) -> list[torch.Tensor]:
        """Copies the device's tensors to host memory. The copies are valid until the next call.

        Calls `meanwhile` before waiting for the device.
        """
        tensors = [states, index, weights]
        if not self._on_gpu:
            meanwhile()
            return tensors
        received = self._inputs(*tensors)
        for host, tensor in zip(received, tensors, strict=True):
            host.copy_(tensor, non_blocking=True)
        copied = torch.cuda.current_stream(self._device).record_event()
        meanwhile()
        copied.synchronize()
        return received

    def output(self, shape: torch.Size) -> torch.Tensor:
        """A float32 buffer for the CPU's result.

        The next layer reuses it: its inputs arrive only after the GPU has read the result.
        """
        return self._buffer("output", shape, torch.float32)

    def decode_inputs(
        self,
        states: torch.Tensor,
        index: torch.Tensor,
        weights: torch.Tensor,
        max_blocks: int,
        max_groups: int,
    ) -> DecodeInputs:
        """Buffers for a job's inputs and table, valid until the next call.

        The GPU sends nothing before the previous job is done.
        """
        size = table_size(max_blocks, max_groups, index.numel())
        return DecodeInputs(
            *self._inputs(states, index, weights),
            inputs_ready=self._inputs_ready,
            table=self._buffer("table", torch.Size([size]), torch.int64),
            table_ready=self._table_ready,
            timed_out=self._timed_out,
            max_blocks=max_blocks,
            max_groups=max_groups,
        )

    def prefill_table(self, table: np.ndarray) -> torch.Tensor:
        """A page-locked copy of an int64 table, valid until the next call.

        The GPU has read it once it has sent the next layer's tokens.
        """
        room = 1 << (len(table) - 1).bit_length()  # seldom grows
        held = self._buffer("prefill_table", torch.Size([room]), torch.int64)[: len(table)]
        held.numpy()[:] = table
        return held

    def _inputs(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        named = zip(("states", "index", "weights"), tensors, strict=True)
        return [self._buffer(name, tensor.shape, tensor.dtype) for name, tensor in named]

    def _buffer(self, name: str, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        buffer = self._buffers.get(name)
        elements = shape.numel()
        if buffer is None or len(buffer) < elements or buffer.dtype != dtype:
            if buffer is not None and self._on_gpu:
                # Kernels that PyTorch does not track may still read the old buffer.
                torch.cuda.synchronize(self._device)
            # Tensors made in inference mode cannot be written to outside it.
            with torch.inference_mode(False):
                buffer = torch.empty(elements, dtype=dtype, pin_memory=self._on_gpu)
            self._buffers[name] = buffer
        return buffer[:elements].view(shape)
