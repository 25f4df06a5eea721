"""Applies the blocks of a table (block_table.py) to tokens, on a GPU.

The kernels read a block in page-locked host memory directly over the link, like one in GPU memory:
no copy, no staging, no wait between the two. Each weight is read once for each tile of an expert's
tokens. In decode there is usually one tile; in prefill, GPU memory and cache have the weights.
"""

import torch
import triton

from fiddler_run.encodings.base import Encoding
from fiddler_run.encodings.lossless12 import Lossless12
from fiddler_run.kernels import triton_kernels as kernels
from fiddler_run.kernels import triton_lossless12 as packed_kernels
from fiddler_run.kernels.block_table import Launch, table_size
from fiddler_run.kernels.launch import (
    STAGES,
    TILE_ROWS,
    WIDE_STAGES,
    down_options,
    gate_up_options,
    tile_tokens,
    wide_down_options,
    wide_gate_up_options,
    width_of,
)
from fiddler_run.kernels.limits import MAX_TOKEN_BLOCKS
from fiddler_run.plan.activation import SILU, Activation


class TableKernels:
    """The kernels for blocks of one size and experts with one activation."""

    def __init__(self, block_format: Encoding, activation: Activation = SILU):
        self.block_format = block_format
        self._activation = {key.upper(): value for key, value in activation}
        self._block_kernels = kernels  # the kernels that read blocks
        self._sizes = {"HIDDEN": block_format.hidden_size, "NEURONS": block_format.block_neurons}
        self._layout = {"ROWS": block_format.rows_per_neuron}
        if isinstance(block_format, Lossless12):
            self._block_kernels = packed_kernels
            parts = ("BASES", "FIRSTS", "ESCAPES", "WEIGHTS")
            self._layout |= zip(parts, block_format.offsets(), strict=True)

    def expert_gemv(
        self,
        table: torch.Tensor,
        max_blocks: int,
        max_groups: int,
        hidden_states: torch.Tensor,
        weights: torch.Tensor,
    ) -> torch.Tensor:
        """Applies the blocks of a table to few tokens: each choice's weighted result, [tokens, k,
        hidden] float32.

        Args:
            table: on the GPU.
            hidden_states: [tokens, hidden].
            weights: of the router, [tokens, k] float32, contiguous.
        """
        tokens, hidden = hidden_states.shape
        neurons = self.block_format.block_neurons
        at_once = tile_tokens(tokens)
        tiles = triton.cdiv(tokens, at_once)
        products = hidden_states.new_empty((max_blocks, tiles * at_once, neurons))
        results = hidden_states.new_empty((*weights.shape, hidden), dtype=torch.float32)
        shape = self._sizes | self._layout | {"TOKENS": at_once}
        options = gate_up_options(self.block_format, at_once)
        self._block_kernels.gate_up[max_blocks * (neurons // options["TILE"]), tiles](
            table,
            max_blocks,
            max_groups,
            0,
            hidden_states,
            weights.shape[1],
            products,
            **shape,
            **self._activation,
            **options,
        )
        self._block_kernels.down[hidden // TILE_ROWS, max_groups, tiles](
            table,
            max_blocks,
            max_groups,
            0,
            0,
            products,
            weights,
            results,
            **shape,
            ADD=False,
            **down_options(self.block_format, at_once),
        )
        return results

    def expert_gemm(
        self,
        table: torch.Tensor,
        num_blocks: int,
        num_groups: int,
        launch: Launch,
        group_tokens: int,
        hidden_states: torch.Tensor,
        weights: torch.Tensor,
        results: torch.Tensor,
    ) -> None:
        """Applies some blocks of a table to many tokens. Adds each choice's weighted result.

        Args:
            table: on the GPU, with `num_blocks` blocks and `num_groups` groups.
            group_tokens: the most choices of a group, a key of WIDE_STAGES.
            hidden_states: [tokens, hidden].
            weights: of the router, [tokens, k] float32, contiguous.
            results: [tokens, k, hidden] float32.
        """
        hidden = hidden_states.shape[1]
        neurons = self.block_format.block_neurons
        shape = self._sizes | self._layout | {"TOKENS": group_tokens}
        gate_up = wide_gate_up_options(self.block_format, group_tokens)
        down = wide_down_options(self.block_format, group_tokens)
        products = hidden_states.new_empty((launch.num_blocks, group_tokens, neurons))
        self._block_kernels.gate_up[launch.num_blocks * (neurons // gate_up["TILE"]),](
            table,
            num_blocks,
            num_groups,
            launch.first_block,
            hidden_states,
            weights.shape[1],
            products,
            **shape,
            **self._activation,
            **gate_up,
        )
        self._block_kernels.down[hidden // down["TILE"], launch.num_groups](
            table,
            num_blocks,
            num_groups,
            launch.first_block,
            launch.first_group,
            products,
            weights,
            results,
            **shape,
            ADD=True,
            **down,
        )

    def group_tokens(self, tokens: float) -> int:
        """The best size of groups, a key of WIDE_STAGES, for experts of `tokens` tokens on average.

        Most groups should hold all tokens of an expert, so that its weights are read once.
        """
        fitting = (size for size in sorted(WIDE_STAGES) if size >= 2 * tokens)
        return next(fitting, max(WIDE_STAGES))

    def max_launch_blocks(self, group_tokens: int) -> int:
        """The most blocks of a launch of `expert_gemm`, counted once for each group.

        Their products take at most the memory of those of MAX_TOKEN_BLOCKS tokens and blocks in
        `apply_blocks`: gate, up, their product and the result, in float32.
        """
        neurons = self.block_format.block_neurons
        of_each = 4 * (4 * neurons + 2 * self.block_format.hidden_size)
        return max(1, MAX_TOKEN_BLOCKS * of_each // (2 * neurons * group_tokens))

    def unpack(self, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Lossless12.decode`, for blocks uint8 [count, block_bytes] on a GPU.

        In memory, the blocks' columns lie side by side: the result of one product is then the sum
        over the blocks.
        """
        hidden = self.block_format.hidden_size
        neurons = self.block_format.block_neurons
        like = {"dtype": torch.bfloat16, "device": blocks.device}
        rows = self.block_format.rows_per_neuron * neurons
        gate_up = torch.empty((len(blocks), rows, hidden), **like)
        down = torch.empty((hidden, len(blocks), neurons), **like)
        packed_kernels.unpack[(rows + hidden) // TILE_ROWS, len(blocks)](
            blocks,
            gate_up,
            down,
            BLOCK_BYTES=self.block_format.block_bytes,
            TILE=TILE_ROWS,
            HIDDEN_WIDTH=width_of(hidden),
            NEURONS_WIDTH=width_of(neurons),
            **self._sizes,
            **self._layout,
        )
        return gate_up, down.transpose(0, 1)

    def compile_blocks(self) -> None:
        """Compiles the variants of these kernels; see `GpuKernels.compile`."""
        hidden = self.block_format.hidden_size
        block = torch.zeros((1, self.block_format.block_bytes), dtype=torch.uint8, device="cuda")
        for tokens in (*STAGES, *WIDE_STAGES):
            states = torch.zeros((tokens, hidden), dtype=torch.bfloat16, device="cuda")
            weights = torch.zeros((tokens, 1), device="cuda")
            content = [1, block.data_ptr(), 0, 0, 1, 0, tokens, *range(tokens)]
            assert len(content) == table_size(1, 1, tokens)
            table = torch.tensor(content, device="cuda")
            results = self.expert_gemv(table, 1, 1, states, weights)
            if tokens in WIDE_STAGES:
                launch = Launch(0, 1, 0, 1)
                self.expert_gemm(table, 1, 1, launch, tokens, states, weights, results)
        if self.block_format.decoded_bytes:
            self.unpack(block)
