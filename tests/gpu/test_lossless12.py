"""lossless12 on a GPU: packed blocks are multiplied, and unpacked bit for bit."""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from activations import ACTIVATIONS, exact_glu

from fiddler_run.encodings.lossless12 import Lossless12
from fiddler_run.engine.engine import make_engine
from fiddler_run.kernels.gpu import GpuKernels
from fiddler_run.kernels.limits import MAX_DECODED_BLOCKS
from fiddler_run.kernels.pytorch import apply_blocks
from fiddler_run.kernels.table import kernels_for
from fiddler_run.plan.activation import SILU
from gpu.conftest import CUDA, assert_layer_matches, page_locked

BLOCKS = Lossless12(hidden_size=256, block_neurons=192)
LONG_BLOCKS = Lossless12(hidden_size=320, block_neurons=1344)  # longer than a tile of the kernels
EXPERTS = 3
SLOTS = 3


def packed(
    outliers: float, encoding: Lossless12 = BLOCKS
) -> tuple[list[tuple[torch.Tensor, ...]], list[torch.Tensor], list]:
    """Experts' matrices, their blocks in page-locked memory, and what the blocks refer to.

    `outliers`: the part of weights that are far smaller than others.
    """
    hidden = encoding.hidden_size
    intermediate = 4 * encoding.block_neurons
    sizes = (intermediate, hidden), (intermediate, hidden), (hidden, intermediate)
    experts = []
    stored = page_locked(torch.empty(4 * EXPERTS, encoding.block_bytes, dtype=torch.uint8)).split(4)
    referred = []
    for blocks in stored:
        matrices = []
        for size in sizes:
            weights = torch.randn(size) * 0.05
            weights[torch.rand(size) < outliers] *= 1e-6
            matrices.append(weights.bfloat16())
        experts.append(tuple(matrices))
        referred += encoding.encode(blocks, *matrices, 0)
    return experts, list(stored), referred


@pytest.mark.parametrize("outliers", [0.0, 1e-3, 0.1])
def test_blocks_are_unpacked_bit_for_bit(outliers):
    torch.manual_seed(0)
    _, stored, referred = packed(outliers)
    assert bool(referred) == (outliers == 0.1)
    for blocks in stored:
        for found, expected in zip(
            GpuKernels(BLOCKS).unpack(blocks.to(CUDA)), BLOCKS.decode(blocks), strict=True
        ):
            assert torch.equal(found.cpu().view(torch.int16), expected.view(torch.int16))


@pytest.mark.parametrize(
    ("encoding", "activation"),
    [*((BLOCKS, each) for each in ACTIVATIONS.values()), (LONG_BLOCKS, SILU)],
)
@pytest.mark.parametrize("outliers", [1e-3, 0.1])
@pytest.mark.parametrize("tokens", [1, 2, 7, 33, 130, 300])
def test_layer_matches_float64(tokens, outliers, encoding, activation):
    torch.manual_seed(tokens)
    experts, stored, referred = packed(outliers, encoding)
    states = torch.randn(tokens, encoding.hidden_size).bfloat16()
    index = torch.stack([torch.randperm(EXPERTS)[:2] for _ in range(tokens)])
    weights = torch.rand(tokens, 2).softmax(dim=1)
    expected = torch.zeros(states.shape, dtype=torch.float64)
    for token, chosen in enumerate(index.tolist()):
        state = states[token].double()
        for expert, weight in zip(chosen, weights[token].double(), strict=True):
            gate, up, down = (matrix.double() for matrix in experts[expert])
            products = exact_glu(activation, gate @ state, up @ state)
            expected[token] += weight * (down @ products)
    engine = make_engine(encoding, CUDA, threads=2, slots=SLOTS, activation=activation)
    assert engine.resources.kernels.decode is not None
    inputs = [tensor.to(CUDA) for tensor in (states, index, weights)]
    splits = ((0, 0.0), (0, 1.0), (4, 0.0), (1, 0.4), (2, 0.5))
    assert_layer_matches(engine, stored, inputs, expected, splits)
    del referred  # blocks refer to it until here


def test_unpacking_takes_the_memory_that_plans_count():
    """More blocks than are unpacked at once, for few tokens, in which weights take the most."""
    torch.manual_seed(0)
    _, stored, referred = packed(1e-3)
    blocks = torch.cat(stored * 2).to(CUDA)
    assert len(blocks) > 2 * MAX_DECODED_BLOCKS
    states = torch.randn(30, BLOCKS.hidden_size, dtype=torch.bfloat16, device=CUDA)
    apply = kernels_for(BLOCKS, CUDA, threads=2).apply
    apply(blocks, states)  # cuBLAS allocates its workspace
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = apply(blocks, states)
    used = torch.cuda.max_memory_allocated() - before
    per_token_block = 4 * (4 * BLOCKS.block_neurons + 2 * BLOCKS.hidden_size)
    products = len(states) * MAX_DECODED_BLOCKS * per_token_block
    assert used <= 1.1 * (MAX_DECODED_BLOCKS * BLOCKS.decoded_bytes + products)
    expected = apply_blocks(BLOCKS, blocks, states)
    assert (found - expected).norm() <= 1e-3 * expected.norm()
    del referred
