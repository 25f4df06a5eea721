"""Experts without a gate: their blocks hold up and down alone."""

import pytest
import torch
from activations import RELU2
from conftest import demo_shape, make_plan
from hand_over import TOLERANCE

from fiddler_run.encodings.base import Encoding
from fiddler_run.encodings.lossless12 import Lossless12
from fiddler_run.encodings.plain import Bf16, Fp32
from fiddler_run.kernels.cpu import CompiledExperts, CpuExperts, PyTorchExperts
from fiddler_run.kernels.library import library, supported_variants
from fiddler_run.kernels.pool import Pool
from fiddler_run.plan.schema import Plan

if library() is None or not Lossless12.available():
    pytest.skip("needs a C++ compiler", allow_module_level=True)

HIDDEN = 128
NEURONS = 192
INTERMEDIATE = 500  # the last block is padded
ENCODINGS = (Bf16, Fp32, Lossless12)


def matrices(outliers: float = 1e-3) -> tuple[torch.Tensor, torch.Tensor]:
    """Up and down in bfloat16. `outliers`: the part of weights that are far smaller than others."""
    found = []
    for size in ((INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)):
        weights = torch.randn(size) * 0.1
        weights[torch.rand(size) < outliers] *= 1e-5
        found.append(weights.bfloat16())
    return tuple(found)


def encoded(
    encoding: Encoding, up: torch.Tensor, down: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """An expert's blocks, and the memory that they refer to."""
    count = encoding.blocks_per_expert(INTERMEDIATE)
    blocks = torch.full((count, encoding.block_bytes), 255, dtype=torch.uint8)
    return blocks, encoding.encode(blocks, None, up, down, 0)


@pytest.mark.parametrize("outliers", [1e-3, 0.1])
@pytest.mark.parametrize("kind", ENCODINGS)
def test_weights_come_back_bit_for_bit(kind, outliers):
    torch.manual_seed(0)
    encoding = kind(HIDDEN, NEURONS, gated=False)
    up, down = matrices(outliers)
    blocks, referred = encoded(encoding, up, down)
    assert bool(referred) == (kind is Lossless12 and outliers == 0.1)
    decodings = [encoding.decode(blocks)]
    if kind is Lossless12:
        decodings.append(encoding.decode_with_pytorch(blocks))
    for rows, columns in decodings:
        assert rows.shape == (3, NEURONS, HIDDEN)
        assert torch.equal(rows.flatten(0, 1)[:INTERMEDIATE], up.to(rows.dtype))
        assert torch.equal(
            columns.transpose(0, 1).flatten(1)[:, :INTERMEDIATE], down.to(rows.dtype)
        )
        assert not rows.flatten(0, 1)[INTERMEDIATE:].any()


@pytest.mark.parametrize("kind", ENCODINGS)
def test_a_block_takes_two_thirds(kind):
    gated, gateless = (kind(4096, 896, gated).block_bytes for gated in (True, False))
    assert gateless / gated == pytest.approx(2 / 3, rel=2e-3)


def kernels(encoding: Encoding) -> list[CpuExperts]:
    pools = [
        Pool(threads, variant=variant) for variant in supported_variants() for threads in (1, 3)
    ]
    return [CompiledExperts(encoding, pool, RELU2) for pool in pools]


@pytest.mark.parametrize("kind", [Bf16, Lossless12])
@pytest.mark.parametrize("tokens", [1, 2, 7, 17, 40])
def test_kernels_match_float64(kind, tokens):
    torch.manual_seed(tokens)
    encoding = kind(HIDDEN, NEURONS, gated=False)
    up, down = matrices()
    blocks, _ = encoded(encoding, up, down)
    states = torch.randn(tokens, HIDDEN).bfloat16()
    expected = (states.double() @ up.double().T).relu().square() @ down.double().T
    for kernel in kernels(encoding):
        found = kernel.apply(blocks, states)
        assert (found - expected).norm() <= TOLERANCE * expected.norm()
    found = PyTorchExperts(encoding, RELU2).apply(blocks, states)
    assert (found - expected).norm() <= 2e-2 * expected.norm()


def test_nan_is_propagated():
    encoding = Bf16(HIDDEN, NEURONS, gated=False)
    blocks, _ = encoded(encoding, *matrices())
    states = torch.full((1, HIDDEN), torch.nan).bfloat16()
    for kernel in (*kernels(encoding), PyTorchExperts(encoding, RELU2)):
        assert kernel.apply(blocks, states).isnan().all()


def test_plan_counts_two_matrices():
    shape = demo_shape()
    gateless = shape.model_copy(update={"activation": RELU2})
    assert gateless.expert_elements == 2 * shape.hidden_size * shape.intermediate_size
    plan = make_plan(gateless, [[0] * 8] * 6)
    assert Plan.parse(plan.dump(), "here") == plan
    assert plan.block_format == Fp32(shape.hidden_size, plan.block_neurons, gated=False)
