"""Applies blocks to tokens with PyTorch's own operations: any encoding, device and dtype."""

from collections.abc import Callable

import torch
from torch.nn.functional import gelu, linear, relu, silu

from fiddler_run.encodings.base import Encoding
from fiddler_run.kernels.limits import MAX_DECODED_BLOCKS, MAX_TOKEN_BLOCKS
from fiddler_run.plan.activation import SILU, Activation

DECODED_AT_ONCE = 8  # blocks on a CPU, because decoding may copy them
Decode = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def apply_blocks(
    encoding: Encoding,
    blocks: torch.Tensor,
    hidden_states: torch.Tensor,
    decode: Decode | None = None,
    activation: Activation = SILU,
) -> torch.Tensor:
    """The sum of `blocks` [count, block_bytes] applied to `hidden_states` [n, hidden], float32.

    Each block computes glu(x gate^T, x up^T) times down^T. On a GPU, the result of glu is rounded
    to the weights' dtype. On a CPU, the result of every matrix product is rounded.

    `decode` does on a GPU what `encoding.decode` does, and is usually faster. The columns that it
    returns lie side by side.
    """
    if blocks.is_cuda:
        products = _batched
        at_once = max(1, MAX_TOKEN_BLOCKS // max(1, len(hidden_states)))
        if decode is not None:
            products = _joined
            at_once = min(joined_at_once(encoding, len(hidden_states)), MAX_DECODED_BLOCKS)
        elif encoding.decoded_bytes:  # PyTorch's operations need several times as much memory
            at_once = 1
        total = None
        for some in blocks.split(at_once):
            # no name keeps the decoded weights while the next ones are decoded
            part = products(*(decode or encoding.decode)(some), hidden_states, activation)
            total = part if total is None else total.add_(part)
            del part
        return total
    # One by one: on the CPU, the batched product of bfloat16 matrices is 40 times slower than
    # linear.
    output = torch.zeros_like(hidden_states, dtype=torch.float32)
    for some in blocks.split(DECODED_AT_ONCE):
        for rows, columns in zip(*encoding.decode(some), strict=True):
            products = glu(activation, linear(hidden_states, rows).float())
            output += linear(products.to(hidden_states.dtype), columns)
    return output


def joined_at_once(encoding: Encoding, tokens: int) -> int:
    """How many blocks `_joined` may take at once for this many tokens.

    It then needs no more memory than `_batched` for MAX_TOKEN_BLOCKS: gate, up, their product and
    the result of each block, in float32.
    """
    neurons = encoding.block_neurons
    hidden = encoding.hidden_size
    room = max(tokens, MAX_TOKEN_BLOCKS) * (4 * neurons + 2 * hidden)
    of_tokens = tokens * 2 * hidden  # the result, and the sum
    of_each = tokens * 4 * neurons
    return max(1, (room - of_tokens) // max(1, of_each))


def glu(activation: Activation, gate_up: torch.Tensor) -> torch.Tensor:
    """Applies an activation to float32 values [..., 2 * b], or [..., b] without a gate: [..., b].

    Overwrites `gate_up` to save memory.
    """
    if not activation.gated:
        return relu(gate_up).mul_(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    if activation.limit is not None:
        gate.clamp_(max=activation.limit)
        up.clamp_(-activation.limit, activation.limit)
    if activation.offset:
        up.add_(activation.offset)
    if activation.function == "gelu_tanh":
        return gelu(gate, approximate="tanh").mul_(up)
    if activation.alpha == 1:
        return silu(gate).mul_(up)
    return (gate * activation.alpha).sigmoid_().mul_(gate).mul_(up)


def _batched(
    gate_up_rows: torch.Tensor,
    down: torch.Tensor,
    hidden_states: torch.Tensor,
    activation: Activation,
) -> torch.Tensor:
    """Rows [count, 2 * b, hidden], or [count, b, hidden] without a gate, and columns [count,
    hidden, b] applied to [n, hidden]: [n, hidden] float32.
    """
    states = hidden_states.expand(len(down), -1, -1)
    gate_up = torch.bmm(states, gate_up_rows.mT, out_dtype=torch.float32)
    products = glu(activation, gate_up).to(hidden_states.dtype)
    return torch.bmm(products, down.mT, out_dtype=torch.float32).sum(dim=0)


def _joined(
    gate_up_rows: torch.Tensor,
    down: torch.Tensor,
    hidden_states: torch.Tensor,
    activation: Activation,
) -> torch.Tensor:
    """As `_batched`, in fewer launches: the blocks' columns lie side by side in memory."""
    tokens = len(hidden_states)
    rows = gate_up_rows.flatten(0, 1)
    columns = down.transpose(0, 1).flatten(1)
    gate_up = torch.mm(hidden_states, rows.mT, out_dtype=torch.float32)
    products = glu(activation, gate_up.view(tokens, len(down), -1)).to(hidden_states.dtype)
    return torch.mm(products.view(tokens, -1), columns.mT, out_dtype=torch.float32)
