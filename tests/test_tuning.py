"""Tuning of the split after loading, on layers whose speeds the test sets."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
from timed_layers import BLOCKS, EXPERTS, LONG, ROUTER, TOP_K, Layer, Resources

from fiddler_run.engine.tuning import (
    TOKENS,
    LayerTimes,
    RouterSizes,
    Tuning,
    decode_shares,
    measure_token,
    tune,
)
from fiddler_run.kernels.limits import MAX_DECODE_TOKENS, MEMORY_BOUND_TOKENS
from fiddler_run.plan.split import scale_odds


def tuned(layers: list[Layer], prompt_tokens: int = LONG) -> Tuning:
    return tune(layers, layers[0].resources, ROUTER, prompt_tokens)


def shares_of(layer: Layer) -> list[float]:
    """The layer's tuned shares, indexed by tokens."""
    tuned([layer])
    return list(layer.decode.shares)


@pytest.mark.parametrize("share", [0.15, 0.3, 0.6])
def test_cpu_and_link_finish_together(share):
    resources = Resources()
    speeds = [(1.0, 2.0), (1.0, 3.0), (2.0, 2.0), (3.0, 2.0)]
    layers = [Layer(resources, share, *each, number=n) for n, each in enumerate(speeds)]
    tuning = tuned(layers)
    assert sorted(tuning.decode) == [0, 1, 2, 3]
    for layer, (cpu_s, link_s) in zip(layers, speeds, strict=True):
        found = list(layer.decode.shares)
        assert found[1] == pytest.approx(cpu_s / (cpu_s + link_s), abs=0.01)
        assert found[1] == pytest.approx(scale_odds(share, tuning.decode[layer.number]))
        planned = [share] * (len(found) - MEMORY_BOUND_TOKENS)
        assert found[MEMORY_BOUND_TOKENS:] == pytest.approx(planned)
        fading = found[1:MEMORY_BOUND_TOKENS]  # from the layer's share to the plan's
        assert sorted(fading, reverse=found[1] > share) == fading


def test_tuning_can_be_applied_to_a_reloaded_model():
    resources = Resources()
    layer = Layer(resources, 0.3, 1.0, 2.0, number=3)
    tuning = tuned([layer])
    again = Layer(resources, 0.3, 9.0, 9.0, number=3)
    tuning.apply([again])
    assert list(again.decode.shares) == list(layer.decode.shares)
    assert again.prefill_odds == layer.prefill_odds == tuning.prefill != 1.0
    Tuning().apply([again])
    assert set(again.decode.shares[1:]) == {0.3}
    assert again.prefill_odds == 1.0


@pytest.mark.parametrize("share", [0.2, 0.8])
def test_prefill_has_one_factor_for_all_layers(share):
    resources = Resources()
    layers = [Layer(resources, share, *each) for each in ((1.0, 2.0), (2.0, 3.0), (3.0, 5.0))]
    layers[1].decode = None  # some of its blocks are on disk
    tuning = tuned(layers)
    assert {layer.prefill_odds for layer in layers} == {tuning.prefill}
    middle = 3 / (3 + 5)  # the median layer's share
    assert scale_odds(share, tuning.prefill) == pytest.approx(middle)
    assert [layer.prompts for layer in layers] == [[128 * EXPERTS // TOP_K] * 2] * 3


def test_one_slow_layer_does_not_change_the_prefill_factor():
    resources = Resources()
    layers = [Layer(resources, 2 / 3, 2.0, 1.0) for _ in range(8)]
    layers[5].prompt_delay_s = 1.0
    assert tuned(layers).prefill == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("share", "num_host", "prompt_tokens", "measured"),
    [
        (0.3, BLOCKS, LONG, 512),
        (0.3, BLOCKS, 300, 300),
        (0.3, BLOCKS, MAX_DECODE_TOKENS, None),
        (0.0, BLOCKS, LONG, None),
        (1.0, BLOCKS, LONG, None),
        (0.3, 0, LONG, None),
    ],
)
def test_prefill_is_measured_only_where_it_can_be_tuned(share, num_host, prompt_tokens, measured):
    layer = Layer(Resources(), share, 1.0, 2.0)
    layer.experts = [SimpleNamespace(num_host=num_host)] * EXPERTS
    tuned([layer], prompt_tokens)
    assert layer.prompts == ([measured] * 2 if measured else [])
    assert (layer.prefill_odds == 1.0) == (measured is None)


def test_one_slow_call_does_not_change_decode_shares():
    found = shares_of(Layer(Resources(), 0.3, 1.0, 2.0, delay_s=100.0))
    assert found[1] == pytest.approx(1 / 3, abs=0.01)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_shares_of_zero_and_one_stay(share):
    assert set(shares_of(Layer(Resources(), share, 1.0, 2.0))[1:]) == {share}


def test_share_too_small_for_one_block_stays():
    assert shares_of(Layer(Resources(), 0.01, 1.0, 2.0))[1] == pytest.approx(0.01)


def test_slow_link_keeps_a_small_share():
    assert 0.0 < shares_of(Layer(Resources(), 0.5, 1.0, 1000.0))[1] <= 0.1


def test_times_of_a_token_by_hand():
    resources = Resources()
    layers = [
        Layer(resources, share, 1.0, 2.0, number=number)
        for number, share in enumerate((0.25, 0.0, 1.0))
    ]

    def measured() -> list[LayerTimes]:
        return measure_token(layers, resources, ROUTER)

    assert measured() == [
        LayerTimes(8, 24, 16.0, 24.0, 24.0),
        LayerTimes(0, 32, 0.0, 32.0, 32.0),
        LayerTimes(32, 0, 64.0, 0.0, 64.0),
    ]
    assert decode_shares(layers) == {0: 0.25}
    layers[0].experts = [SimpleNamespace(num_host=0)] * EXPERTS
    assert measured()[0] == LayerTimes(0, 0, 0.0, 0.0, 0.0)
    assert decode_shares(layers) == {}
    layers[0].decode = None  # some of its blocks are on disk
    assert decode_shares(layers) == {}


@pytest.mark.parametrize(("top_k", "experts"), [(1, 8), (2, 8), (8, 64), (3, 4), (2, 2)])
def test_measured_experts_are_spread_over_the_layer(top_k, experts, monkeypatch):
    resources = Resources()
    called = set()
    layer = Layer(resources, 0.25, 1.0, 2.0)
    layer.experts = layer.experts[:1] * experts
    router = RouterSizes(experts, top_k, hidden_size=4)

    def call(self, states, index, weights):
        assert index.unique().numel() == index.numel() == top_k
        called.update(index.flatten().tolist())

    monkeypatch.setattr(Layer, "__call__", call)
    for number in range(TOKENS):
        measure_token([layer], resources, router, number)
    gaps = [b - a for a, b in pairwise([*sorted(called), experts + min(called)])]
    assert max(gaps) <= max(1, -(-experts // (top_k * TOKENS)))


def test_without_a_decode_path_only_prefill_is_tuned():
    resources = Resources(decode=None)
    layer = Layer(resources, 0.25, 1.0, 2.0)
    tuning = tuned([layer])
    assert tuning.decode == {}
    assert tuning.prefill != 1.0
    assert layer.decode.shares[1] == 0.25
