"""The GPU's side of the hand-over with the CPU's threads, and the kernels that apply blocks.

On the decode path, `publish_inputs` gives the threads the tokens and the router's choices. They
answer with a table (block_table.py). After `wait_for_table`, the GPU works on the table
(`expert_gemv`) while the CPU computes the other blocks, and `combine` waits for the CPU's result.
The GPU waits for flags in page-locked memory, so all of this can be queued long before, along with
the next layer.
"""

import torch
import triton

from fiddler_run.encodings.base import Encoding
from fiddler_run.kernels import triton_kernels as kernels
from fiddler_run.kernels.decode_layer import GPU_TIMEOUT_S, Job
from fiddler_run.kernels.launch import TILE_NEURONS, width_of
from fiddler_run.kernels.table_kernels import TableKernels

PIECE = 512  # table entries copied by one program
CHOICES = 16  # a token's choices that a program loads at once
COMBINED = 256  # columns combined by one program


def supports(block_format: Encoding) -> bool:
    """True if the kernels support blocks of these sizes."""
    return block_format.hidden_size % 64 == 0 and block_format.block_neurons % TILE_NEURONS == 0


class GpuKernels(TableKernels):
    """The kernels for blocks of one size. Flags are [1] int64 in page-locked memory."""

    def compile(self) -> None:
        """Compiles all variants, which takes seconds the first time.

        Otherwise, compilation would interrupt generation. No variant depends on how many experts a
        token chooses.

        Raises:
            Exception: of many types, if Triton does not work.
        """
        hidden = self.block_format.hidden_size
        flag = torch.zeros(1, dtype=torch.int64, pin_memory=True)
        gave_up = torch.zeros(1, dtype=torch.int64, pin_memory=True)
        states = torch.zeros((1, hidden), dtype=torch.bfloat16, device="cuda")
        index = torch.zeros((1, 1), dtype=torch.int64, device="cuda")
        sent = states, index, torch.zeros((1, 1), device="cuda")
        host = [torch.empty_like(each, device="cpu", pin_memory=True) for each in sent]
        job = Job(torch.zeros(1, dtype=torch.int64, device="cuda"), 0)
        self.publish_inputs(sent, host, flag, job)
        self.wait_for_table(flag, flag, gave_up, job, states.device)
        results = torch.zeros((1, 1, hidden), device="cuda")
        cpu_output = torch.zeros((1, hidden), pin_memory=True)
        for each in (cpu_output, None):
            self.combine(results, index, 1, each, states.dtype)
        self.compile_blocks()
        torch.cuda.synchronize()

    def publish_inputs(
        self,
        tensors: tuple[torch.Tensor, ...],
        host: list[torch.Tensor],
        inputs_ready: torch.Tensor,
        job: Job,
    ) -> None:
        """Copies a layer's inputs to page-locked memory, then marks each token as ready.

        Args:
            tensors: states [tokens, hidden], index [tokens, k] int64, weights [tokens, k] float32.
            host: their counterparts in page-locked memory.
            inputs_ready: [tokens] int64, each set to `job`.
        """
        tokens, hidden = tensors[0].shape
        kernels.publish_inputs[tokens,](
            *tensors,
            *host,
            inputs_ready,
            *job,
            tensors[1].shape[1],
            HIDDEN=hidden,
            WIDTH=width_of(hidden, most=1024),
            CHOICES=CHOICES,
            num_warps=4,
        )

    def wait(self, flag: torch.Tensor, gave_up: torch.Tensor, job: Job) -> None:
        """Makes the GPU wait until `flag` holds the job's number, for at most `GPU_TIMEOUT_S`.

        After that, it sets `gave_up` to the job's number: the process may have been stopped, and a
        waiting kernel blocks the display.
        """
        kernels.wait[1,](flag, gave_up, *job, int(GPU_TIMEOUT_S * 1e9))

    def wait_for_table(
        self,
        table: torch.Tensor,
        table_ready: torch.Tensor,
        gave_up: torch.Tensor,
        job: Job,
        device: torch.device,
    ) -> torch.Tensor:
        """A copy of the page-locked table on the GPU, once the table is complete.

        If the GPU timed out, it is a table of no blocks.
        """
        self.wait(table_ready, gave_up, job)
        return self.read_table(table, gave_up, device)

    def read_table(
        self, table: torch.Tensor, gave_up: torch.Tensor, device: torch.device
    ) -> torch.Tensor:
        """A copy of the page-locked table on the GPU. If the GPU timed out, a table of no blocks.

        The GPU reads it in place. A copy would wait for all copies of blocks that are queued.
        """
        copied = torch.empty(table.shape, dtype=table.dtype, device=device)
        pieces = triton.cdiv(len(table), PIECE)
        kernels.read_table[pieces,](table, copied, gave_up, len(table), PIECE=PIECE)
        return copied

    def combine(
        self,
        results: torch.Tensor,
        index: torch.Tensor,
        num_experts: int,
        cpu_output: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """The layer's output [tokens, hidden] in `dtype`.

        Args:
            results: [tokens, k, hidden] float32, of the GPU's blocks.
            index: the router's choices [tokens, k] int64; choices of nonexistent experts are
                ignored.
            cpu_output: [tokens, hidden] float32, page-locked and complete. None if the CPU has no
                part.
        """
        tokens, _, hidden = results.shape
        output = results.new_empty((tokens, hidden), dtype=dtype)
        combined = width_of(hidden, COMBINED)
        kernels.combine[tokens, hidden // combined](
            results,
            index,
            num_experts,
            results.shape[1],
            cpu_output,
            output,
            HIDDEN=hidden,
            WIDTH=combined,
            CHOICES=CHOICES,
        )
        return output
