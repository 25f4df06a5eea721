"""Cutting an expert into blocks loses nothing, whatever the block size and wherever the cut between arenas."""

import pytest
import torch
from torch.nn.functional import silu

from fiddler_run.arena import fill_blocks
from fiddler_run.kernels.pytorch import apply_blocks

HIDDEN = 24


def expert(intermediate: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(intermediate)
    return torch.randn(intermediate, HIDDEN), torch.randn(intermediate, HIDDEN), torch.randn(HIDDEN, intermediate)


def reference(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    x, gate, up, down = (tensor.double() for tensor in (x, gate, up, down))
    return (silu(x @ gate.T) * (x @ up.T)) @ down.T


@pytest.mark.parametrize(("intermediate", "block"), [(64, 16), (64, 64), (100, 32), (5, 32), (33, 32)])
def test_any_cut_gives_the_same_expert(intermediate, block):
    weights = expert(intermediate)
    count = -(-intermediate // block)
    x = torch.randn(7, HIDDEN)
    expected = reference(x, *weights)
    for cut in range(count + 1):
        first, second = torch.full((cut, 3 * block * HIDDEN), torch.nan), torch.full((count - cut, 3 * block * HIDDEN), torch.nan)
        fill_blocks(first, *weights, first_neuron=0)
        fill_blocks(second, *weights, first_neuron=cut * block)
        total = apply_blocks(first, x) + apply_blocks(second, x)
        assert torch.allclose(total.double(), expected, rtol=1e-4, atol=1e-4)


def test_block_layout():
    gate, up, down = expert(4)
    blocks = torch.empty(2, 3 * 2 * HIDDEN)
    fill_blocks(blocks, gate, up, down, first_neuron=0)
    expected = torch.cat([gate[2:4].flatten(), up[2:4].flatten(), down[:, 2:4].flatten()])
    assert torch.equal(blocks[1], expected)
