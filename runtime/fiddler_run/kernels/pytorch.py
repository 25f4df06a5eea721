"""Blocks applied to tokens by PyTorch's own operations, on any device and in any dtype."""

from functools import reduce

import torch
from torch.nn.functional import linear, silu

from fiddler_run.plan import TOKEN_BLOCKS


def apply_blocks(blocks: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
    """The sum of `blocks` [count, block_elements] applied to `hidden_states` [n, hidden]: [n, hidden] float32.

    Each block is silu(x gate^T) * (x up^T) times down^T; on a GPU with one rounding to the weights' dtype, of the product, on
    a CPU with one more of every matrix product's result.
    """
    gate_up_rows, down = block_views(blocks, hidden_states.shape[1])
    if blocks.is_cuda:
        at_once = max(1, TOKEN_BLOCKS // max(1, len(hidden_states)))
        batches = zip(gate_up_rows.split(at_once), down.split(at_once), strict=True)
        return reduce(torch.Tensor.add_, (_apply_batched(*batch, hidden_states) for batch in batches))
    # One by one: the batched product of bfloat16 matrices is 40 times slower on the CPU than linear.
    output = torch.zeros_like(hidden_states, dtype=torch.float32)
    for rows, columns in zip(gate_up_rows, down, strict=True):
        gate, up = linear(hidden_states, rows).chunk(2, dim=-1)
        output += linear(silu(gate.float()).mul_(up).to(hidden_states.dtype), columns)
    return output


def _apply_batched(gate_up_rows: torch.Tensor, down: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
    """[count, 2 * b, hidden] and [count, hidden, b], over [n, hidden]: [n, hidden] float32."""
    states = hidden_states.expand(len(down), -1, -1)
    gate, up = torch.bmm(states, gate_up_rows.mT, out_dtype=torch.float32).chunk(2, dim=-1)
    products = silu(gate).mul_(up).to(hidden_states.dtype)
    return torch.bmm(products, down.mT, out_dtype=torch.float32).sum(dim=0)


def block_views(blocks: torch.Tensor, hidden: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Gate above up [count, 2 * b, hidden], and down [count, hidden, b], inside `blocks` [count, 3 * b * hidden]."""
    third = blocks.shape[1] // 3
    gate_up, down = blocks.split((2 * third, third), dim=1)
    return gate_up.unflatten(1, (-1, hidden)), down.unflatten(1, (hidden, -1))
