"""A layer's experts on GPU, link and CPU at once, by both paths."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from activations import exact_glu, with_each_activation

from fiddler_run.encodings.plain import Bf16
from fiddler_run.engine import device_part
from fiddler_run.engine.engine import ExpertEngine
from fiddler_run.engine.layer import ExpertsLayer
from fiddler_run.engine.tuning import RouterSizes, measure_prompt
from fiddler_run.generation.model import PlannedModel
from fiddler_run.kernels.table import kernels_for
from fiddler_run.plan.activation import SILU, Activation
from gpu.conftest import CUDA, assert_layer_matches, page_locked

BLOCKS = Bf16(hidden_size=256, block_neurons=96)
EXPERTS = 3
MANY_EXPERTS = 40
BLOCKS_PER_EXPERT = 4
SLOTS = 3


def engines(activation: Activation) -> Iterator[ExpertEngine]:
    """Yields an engine with the decode path, then one without it."""
    kernels = kernels_for(BLOCKS, CUDA, threads=2, activation=activation)
    assert kernels.decode is not None
    for each in (kernels, replace(kernels, decode=None)):
        yield ExpertEngine(BLOCKS, each, CUDA, SLOTS)


def exact_sums(
    experts: tuple[torch.Tensor, ...],
    states: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    activation: Activation,
) -> torch.Tensor:
    """The experts' weighted sums, float64 [tokens, hidden].

    `experts`: the blocks of each expert, uint8 [count, block_bytes].
    """
    sums = torch.zeros(states.shape, dtype=torch.float64)
    for expert in index.unique().tolist():
        tokens, places = (index == expert).nonzero(as_tuple=True)
        for gate_up, down in zip(*BLOCKS.decode(experts[expert]), strict=True):
            gate, up = (states[tokens].double() @ gate_up.double().T).chunk(2, dim=1)
            products = exact_glu(activation, gate, up)
            weighted = weights[tokens, places].double().unsqueeze(1) * (products @ down.double().T)
            sums.index_add_(0, tokens, weighted)
    return sums


@with_each_activation
@pytest.mark.parametrize("tokens", [1, 2, 7, 16, 33, 64, 130])
def test_both_paths_match_float64(tokens: int, activation: Activation):
    """For several splits; a second call gives the same bits."""
    torch.manual_seed(tokens)
    count = EXPERTS * BLOCKS_PER_EXPERT
    stored = torch.randn(count, BLOCKS.block_bytes // 2).mul_(0.05).bfloat16()
    experts = page_locked(stored.view(torch.uint8)).split(BLOCKS_PER_EXPERT)
    states = torch.randn(tokens, BLOCKS.hidden_size).bfloat16()
    index = torch.stack([torch.randperm(EXPERTS)[:2] for _ in range(tokens)])
    weights = torch.rand(tokens, 2).softmax(dim=1)
    expected = exact_sums(experts, states, index, weights, activation)
    inputs = [tensor.to(CUDA) for tensor in (states, index, weights)]
    splits = ((0, 0.0), (0, 1.0), (4, 0.0), (1, 0.4), (2, 0.5), (3, 0.0))
    for engine in engines(activation):
        assert_layer_matches(engine, experts, inputs, expected, splits)


@with_each_activation
@pytest.mark.parametrize("tokens", [270, 700])
@pytest.mark.parametrize("work", [0, 2**62])
def test_prompt_of_many_experts_matches_float64(
    tokens: int, work: int, activation: Activation, monkeypatch: pytest.MonkeyPatch
):
    """Together and one by one; pieces of the ring then hold blocks of several experts."""
    monkeypatch.setattr(device_part, "MAX_GROUPED_WORK", work)
    torch.manual_seed(tokens)
    count = MANY_EXPERTS * BLOCKS_PER_EXPERT
    stored = torch.randn(count, BLOCKS.block_bytes // 2).mul_(0.05).bfloat16()
    experts = page_locked(stored.view(torch.uint8)).split(BLOCKS_PER_EXPERT)
    states = torch.randn(tokens, BLOCKS.hidden_size).bfloat16()
    index = torch.stack([torch.randperm(MANY_EXPERTS)[:5] for _ in range(tokens)])
    index[: tokens // 2, 0] = 7  # an expert with many tokens
    index[: tokens // 2, 1:] = 8 + torch.arange(4)
    index[1, 2] = MANY_EXPERTS
    weights = torch.rand(tokens, 5).softmax(dim=1)
    known = weights.clone()
    known[1, 2] = 0.0
    expected = exact_sums(experts, states, index.clamp(max=MANY_EXPERTS - 1), known, activation)
    inputs = [tensor.to(CUDA) for tensor in (states, index, weights)]
    splits = ((0, 1.0), (4, 0.0), (1, 0.4), (2, 0.5))
    kernels = kernels_for(BLOCKS, CUDA, threads=2, activation=activation)
    engine = ExpertEngine(BLOCKS, kernels, CUDA, 11)
    assert_layer_matches(engine, experts, inputs, expected, splits)


def test_prefetched_blocks_are_used():
    """Layers that prefetch for each other, with other numbers of tokens than expected."""
    torch.manual_seed(0)
    count = MANY_EXPERTS * BLOCKS_PER_EXPERT
    layers = []
    places = []
    engine = ExpertEngine(BLOCKS, kernels_for(BLOCKS, CUDA, threads=2), CUDA, 11)

    def share_at(tokens: int) -> float:
        return min(0.9, tokens / 60)

    for number in range(3):
        stored = torch.randn(count, BLOCKS.block_bytes // 2).mul_(0.05).bfloat16()
        experts = page_locked(stored.view(torch.uint8)).split(BLOCKS_PER_EXPERT)
        nothing = [blocks[:0].to(CUDA) for blocks in experts]
        layers.append(ExpertsLayer(number, nothing, experts, share_at, engine))
        places.append(experts)
    for layer, following in pairwise(layers):
        layer.next = following
    for tokens in (300, 301, 420):
        states = torch.randn(tokens, BLOCKS.hidden_size).bfloat16()
        index = torch.randn(tokens, MANY_EXPERTS).topk(5).indices
        weights = torch.rand(tokens, 5).softmax(dim=1)
        inputs = [tensor.to(CUDA) for tensor in (states, index, weights)]
        for layer, experts in zip(layers, places, strict=True):
            expected = exact_sums(experts, states, index, weights, SILU)
            output = layer(*inputs).cpu().double()
            assert (output - expected).norm() <= 3e-3 * expected.norm()
    engine.resources.settle()


@pytest.mark.parametrize("tokens", [1, 5, 300])
def test_unknown_experts_add_nothing(wide_bfloat16: PlannedModel, tokens: int):
    """transformers marks experts of other processes by such indices, in prefill and decode."""
    layer = wide_bfloat16.layers[1]
    generator = torch.Generator(CUDA).manual_seed(tokens)
    states = torch.randn(tokens, 1024, generator=generator, device=CUDA).bfloat16()
    weights, index = torch.rand(tokens, 8, generator=generator, device=CUDA).topk(2)
    without = weights.clone()
    without[:, 1] = 0.0
    expected = layer(states, index, without).float()
    for outside in (8, 9, -1):
        marked = index.clone()
        marked[:, 1] = outside
        for chosen in (marked, marked.int()):
            found = layer(states, chosen, weights).float()
            assert (found - expected).norm() <= 1e-2 * expected.norm()
    wide_bfloat16.engine.resources.settle()


def test_prefill_result_does_not_depend_on_the_split(wide_bfloat16: PlannedModel):
    layers = wide_bfloat16.layers
    router = RouterSizes(num_experts=8, top_k=2, hidden_size=1024)
    times = measure_prompt(layers, wide_bfloat16.engine.resources, router, 400)
    assert len(times) == len(layers)
    generator = torch.Generator(CUDA).manual_seed(1)
    states = torch.randn(400, 1024, generator=generator, device=CUDA).bfloat16()
    weights, index = torch.rand(400, 8, generator=generator, device=CUDA).topk(2)
    expected = None
    for odds in (1.0, 8.0, 0.125):
        for layer in layers:
            layer.prefill_odds = odds
        outputs = [layer(states, index, weights).float() for layer in layers]
        expected = expected or outputs
        for output, other in zip(outputs, expected, strict=True):
            assert (output - other).abs().max() < 1e-2 * other.abs().max()
    for layer in layers:
        layer.prefill_odds = wide_bfloat16.tuning.prefill
