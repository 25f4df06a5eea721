"""The decode path's GPU kernels. The CPU's threads tell them what to do.

`publish_inputs` gives these threads the tokens and the router's choices. They answer with a table;
decode_layer.py describes it. After `wait_for_table`, the GPU works on the table (`expert_gemv`)
while the CPU computes the other blocks, and `combine` waits for the CPU's result. The GPU waits for
flags in page-locked memory, so all of this can be queued long before, along with the next layer.

The kernels read a block in page-locked host memory directly over the link, like one in GPU memory:
no copy, no staging, no wait between the two. Each weight is read once for each tile of an expert's
tokens, and usually there is one tile.
"""

import torch
import triton

from fiddler_run.encodings.base import Encoding
from fiddler_run.encodings.lossless12 import Lossless12
from fiddler_run.kernels import triton_kernels as kernels
from fiddler_run.kernels import triton_lossless12 as packed_kernels
from fiddler_run.kernels.decode_layer import GPU_TIMEOUT_S
from fiddler_run.kernels.launch import (
    STAGES,
    TILE_NEURONS,
    TILE_ROWS,
    down_options,
    gate_up_options,
    tile_tokens,
    width_of,
)

PIECE = 512  # table entries copied by one program


def supports(block_format: Encoding) -> bool:
    """True if the kernels support blocks of these sizes."""
    return block_format.hidden_size % 64 == 0 and block_format.block_neurons % TILE_NEURONS == 0


class GpuKernels:
    """The kernels for blocks of one size. Flags are [1] int64 in page-locked memory."""

    def __init__(self, block_format: Encoding):
        self.block_format = block_format
        self._block_kernels = kernels  # the kernels that read blocks
        self._layout: dict[str, int] = {}
        if isinstance(block_format, Lossless12):
            self._block_kernels = packed_kernels
            parts = ("BASES", "FIRSTS", "ESCAPES", "WEIGHTS")
            self._layout = dict(zip(parts, block_format.offsets(), strict=True))

    def compile(self) -> None:
        """Compiles the variants for small batches, which takes seconds the first time.

        Otherwise, compilation would interrupt decode.

        Raises:
            Exception: of many types, if Triton does not work.
        """
        hidden = self.block_format.hidden_size
        flag = torch.zeros(max(STAGES), dtype=torch.int64, pin_memory=True)
        gave_up = torch.zeros(1, dtype=torch.int64, pin_memory=True)
        block = torch.zeros((1, self.block_format.block_bytes), dtype=torch.uint8, device="cuda")
        for tokens in STAGES:
            states = torch.zeros((tokens, hidden), dtype=torch.bfloat16, device="cuda")
            index = torch.zeros((tokens, 2), dtype=torch.int64, device="cuda")
            weights = torch.zeros((tokens, 2), device="cuda")
            sent = states, index, weights
            host = [torch.empty_like(each, device="cpu", pin_memory=True) for each in sent]
            self.publish_inputs(sent, host, flag, 0)
            table = torch.tensor([1, block.data_ptr(), 0, 0, 1, 0, 2 * tokens, *range(2 * tokens)])
            table = self.wait_for_table(table.pin_memory(), flag, gave_up, 0, states.device)
            results = self.expert_gemv(table, 1, 1, states, weights)
            cpu_output = torch.zeros((tokens, hidden), pin_memory=True)
            self.combine(results, index, 1, cpu_output, flag, gave_up, 0, states)
        if self.block_format.decoded_bytes:
            self.unpack(block)
        torch.cuda.synchronize()

    def publish_inputs(
        self,
        tensors: tuple[torch.Tensor, ...],
        host: list[torch.Tensor],
        inputs_ready: torch.Tensor,
        job: int,
    ) -> None:
        """Copies a layer's inputs to page-locked memory, then marks each token as ready.

        Args:
            tensors: states [tokens, hidden], index [tokens, k] int64, weights [tokens, k] float32.
            host: their counterparts in page-locked memory.
            inputs_ready: [tokens] int64, each set to `job`.
        """
        tokens, hidden = tensors[0].shape
        top_k = tensors[1].shape[1]
        kernels.publish_inputs[tokens,](
            *tensors,
            *host,
            inputs_ready,
            job,
            HIDDEN=hidden,
            WIDTH=width_of(hidden, most=1024),
            TOP_K=top_k,
            CHOICES=triton.next_power_of_2(top_k),
            num_warps=4,
        )

    def wait(self, flag: torch.Tensor, gave_up: torch.Tensor, job: int) -> None:
        """Makes the GPU wait until `flag` holds the job's number, for at most `GPU_TIMEOUT_S`.

        After that, it sets `gave_up` to the job's number: the process may have been stopped, and a
        waiting kernel blocks the display.
        """
        kernels.wait[1,](flag, gave_up, job, int(GPU_TIMEOUT_S * 1e9))

    def wait_for_table(
        self,
        table: torch.Tensor,
        table_ready: torch.Tensor,
        gave_up: torch.Tensor,
        job: int,
        device: torch.device,
    ) -> torch.Tensor:
        """A copy of the page-locked table on the GPU, once the table is complete.

        If the GPU timed out, it is a table of no blocks.
        """
        copied = torch.empty(table.shape, dtype=table.dtype, device=device)
        self.wait(table_ready, gave_up, job)
        pieces = triton.cdiv(len(table), PIECE)
        kernels.read_table[pieces,](table, copied, gave_up, len(table), PIECE=PIECE)
        return copied

    def expert_gemv(
        self,
        table: torch.Tensor,
        max_blocks: int,
        num_experts: int,
        hidden_states: torch.Tensor,
        weights: torch.Tensor,
    ) -> torch.Tensor:
        """Applies the blocks of a table: each choice's weighted result, [tokens, k, hidden]
        float32.

        Args:
            table: on the GPU.
            hidden_states: [tokens, hidden].
            weights: of the router, [tokens, k] float32, contiguous.
        """
        tokens, hidden = hidden_states.shape
        top_k = weights.shape[1]
        neurons = self.block_format.block_neurons
        at_once = tile_tokens(tokens)
        tiles = triton.cdiv(tokens, at_once)
        products = hidden_states.new_empty((max_blocks, tiles * at_once, neurons))
        results = hidden_states.new_empty((tokens, top_k, hidden), dtype=torch.float32)
        shape = {"HIDDEN": hidden, "NEURONS": neurons, "TOP_K": top_k, "TOKENS": at_once}
        shape |= self._layout
        self._block_kernels.gate_up[max_blocks * (neurons // TILE_NEURONS), tiles](
            table,
            max_blocks,
            num_experts,
            hidden_states,
            products,
            **shape,
            **gate_up_options(self.block_format, at_once),
        )
        self._block_kernels.down[hidden // TILE_ROWS, num_experts, tiles](
            table,
            max_blocks,
            num_experts,
            products,
            weights,
            results,
            **shape,
            **down_options(self.block_format, at_once),
        )
        return results

    def combine(
        self,
        results: torch.Tensor,
        index: torch.Tensor,
        num_experts: int,
        cpu_output: torch.Tensor,
        output_ready: torch.Tensor,
        gave_up: torch.Tensor,
        job: int,
        like: torch.Tensor,
    ) -> torch.Tensor:
        """The layer's output, with the shape [tokens, hidden], dtype and device of `like`.

        Args:
            results: [tokens, k, hidden] float32, of the GPU's blocks.
            index: the router's choices [tokens, k] int64; choices of nonexistent experts are
                ignored.
            cpu_output: [tokens, hidden] float32, page-locked. Complete when `output_ready` holds
                the job's number; the GPU waits for that, not Python.
        """
        output = torch.empty_like(like)
        tokens, hidden = like.shape
        width = width_of(hidden, most=1024)
        self.wait(output_ready, gave_up, job)
        kernels.combine[tokens, hidden // width](
            results,
            index,
            num_experts,
            cpu_output,
            output,
            HIDDEN=hidden,
            WIDTH=width,
            CHOICES=results.shape[1],
        )
        return output

    def unpack(self, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Lossless12.decode`, for blocks uint8 [count, block_bytes] on a GPU."""
        hidden, neurons = self.block_format.hidden_size, self.block_format.block_neurons
        like = {"dtype": torch.bfloat16, "device": blocks.device}
        gate_up = torch.empty((len(blocks), 2 * neurons, hidden), **like)
        down = torch.empty((len(blocks), hidden, neurons), **like)
        packed_kernels.unpack[(2 * neurons + hidden) // TILE_ROWS, len(blocks)](
            blocks,
            gate_up,
            down,
            BLOCK_BYTES=self.block_format.block_bytes,
            HIDDEN=hidden,
            NEURONS=neurons,
            TILE=TILE_ROWS,
            HIDDEN_WIDTH=width_of(hidden),
            NEURONS_WIDTH=width_of(neurons),
            **self._layout,
        )
        return gate_up, down
