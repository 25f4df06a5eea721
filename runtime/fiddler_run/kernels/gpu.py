"""The decode path's GPU kernels for blocks in bf16, which take their orders from the CPU's threads.

`publish_inputs` gives those threads the tokens and the router's choices. They answer with a table
(`wait_for_table`; decode_layer.py says what is in it), on which the GPU works (`expert_gemv`) while
they compute the other blocks; `combine` waits for their result. The GPU waits for flags in
page-locked memory, so that all of this, and the next layer's work, can be queued long before.

A block in page-locked host memory is read by the kernel itself, over the link, just as one in GPU
memory is: no copy, no staging, no wait between the two. Every weight is read once for each tile of
an expert's tokens: usually there is one.
"""

import torch
import triton

from fiddler_run.encodings.base import Encoding
from fiddler_run.kernels import triton_kernels as kernels
from fiddler_run.kernels.decode_layer import GPU_TIMEOUT_S

TILE_NEURONS = 32
TILE_ROWS = 16
TILE_WIDTH = 128
# Loads under way, by tokens of a tile; these fit 99 KB of shared memory.
STAGES = {16: 4, 32: 3, 64: 2}
PIECE = 512  # of a table


def supports(block_format: Encoding) -> bool:
    """True if the kernels take blocks of these sizes."""
    return block_format.hidden_size % 64 == 0 and block_format.block_neurons % TILE_NEURONS == 0


class DecodeKernels:
    """The kernels for blocks of one size. Flags are [1] int64 in page-locked memory."""

    def __init__(self, block_format: Encoding):
        self.block_format = block_format

    def compile(self) -> None:
        """Compiles the variants for small batches; takes seconds the first time.

        Later it would interrupt decode.

        Raises:
            Exception: of many types, where Triton does not work.
        """
        hidden = self.block_format.hidden_size
        flag = torch.zeros(max(STAGES), dtype=torch.int64, pin_memory=True)
        gave_up = torch.zeros(1, dtype=torch.int64, pin_memory=True)
        block = torch.zeros((1, self.block_format.block_bytes), dtype=torch.uint8, device="cuda")
        for tokens in STAGES:
            states = torch.zeros((tokens, hidden), dtype=torch.bfloat16, device="cuda")
            index = torch.zeros((tokens, 2), dtype=torch.int64, device="cuda")
            weights = torch.zeros((tokens, 2), device="cuda")
            host = [
                torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                for tensor in (states, index, weights)
            ]
            self.publish_inputs((states, index, weights), host, flag, 0)
            table = torch.tensor([1, block.data_ptr(), 0, 0, 1, 0, 2 * tokens, *range(2 * tokens)])
            table = self.wait_for_table(table.pin_memory(), flag, gave_up, 0, states.device)
            results = self.expert_gemv(table, 1, 1, states, weights)
            cpu_output = torch.zeros((tokens, hidden), pin_memory=True)
            self.combine(results, index, 1, cpu_output, flag, gave_up, 0, states)
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
            WIDTH=_width(hidden, most=1024),
            TOP_K=top_k,
            CHOICES=triton.next_power_of_2(top_k),
            num_warps=4,
        )

    def wait(self, flag: torch.Tensor, gave_up: torch.Tensor, job: int) -> None:
        """Lets the GPU wait until `flag` holds the job's number, for at most `GPU_TIMEOUT_S`.

        Then it sets `gave_up` to the job's number: a process may be stopped, and a waiting kernel
        blocks the display.
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
        """A copy of the page-locked table on the GPU, once it is complete.

        If the GPU gave up waiting, it is a table of no blocks.
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
        """The blocks of a table applied: each choice's weighted result, [tokens, k, hidden]
        float32.

        Args:
            table: on the GPU.
            hidden_states: [tokens, hidden].
            weights: of the router, [tokens, k] float32, contiguous.
        """
        tokens, hidden = hidden_states.shape
        top_k = weights.shape[1]
        neurons = self.block_format.block_neurons
        tile_tokens = min(max(STAGES), max(min(STAGES), triton.next_power_of_2(tokens)))
        tiles = triton.cdiv(tokens, tile_tokens)
        products = hidden_states.new_empty((max_blocks, tiles * tile_tokens, neurons))
        results = torch.empty(
            (tokens, top_k, hidden), dtype=torch.float32, device=hidden_states.device
        )
        shape = {"HIDDEN": hidden, "NEURONS": neurons, "TOP_K": top_k, "TOKENS": tile_tokens}
        launch = {"num_warps": 4, "num_stages": STAGES[tile_tokens]}
        kernels.gate_up[max_blocks * (neurons // TILE_NEURONS), tiles](
            table,
            max_blocks,
            num_experts,
            hidden_states,
            products,
            **shape,
            TILE=TILE_NEURONS,
            WIDTH=_width(hidden),
            **launch,
        )
        kernels.down[hidden // TILE_ROWS, num_experts, tiles](
            table,
            max_blocks,
            num_experts,
            products,
            weights,
            results,
            **shape,
            TILE=TILE_ROWS,
            WIDTH=_width(neurons),
            **launch,
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
        """The layer's output, of shape [tokens, hidden], dtype and device of `like`.

        Args:
            results: [tokens, k, hidden] float32 of the GPU's blocks.
            index: the router's choices [tokens, k] int64; those of no expert are left out.
            cpu_output: [tokens, hidden] float32, page-locked; complete when `output_ready` holds
                the job's number. The GPU waits for that, not Python.
        """
        output = torch.empty_like(like)
        tokens, hidden = like.shape
        width = _width(hidden, most=1024)
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


def _width(length: int, most: int = TILE_WIDTH) -> int:
    """The largest power of two up to `most`, one itself, that divides `length`."""
    return min(most, length & -length)
