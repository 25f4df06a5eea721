"""The KV cache: fixed in memory while it has room, then like transformers' DynamicCache."""

import pytest
import torch
from transformers import DynamicCache, MixtralConfig

from fiddler_run.generation.cache import KeyValueCache


def small_cache() -> KeyValueCache:
    """2 layers, 3 sequences of 4 tokens."""
    return KeyValueCache(MixtralConfig(num_hidden_layers=2), 3, 4)


PROMPT = torch.arange(24.0).view(3, 2, 2, 2)  # 3 sequences, 2 heads, 2 tokens, 2 numbers


def test_cache_keeps_its_address():
    cache = small_cache()
    keys, values = cache.update(PROMPT, -PROMPT, 1)
    where = keys.data_ptr(), values.data_ptr()
    assert torch.equal(keys, PROMPT)
    assert cache.get_seq_length(1) == 2
    cache.layers[1].reorder_cache(torch.tensor([2, 2, 0]))
    keys, values = cache.update(torch.ones(3, 2, 1, 2), torch.zeros(3, 2, 1, 2), 1)
    assert torch.equal(keys[:, :, :2], PROMPT[[2, 2, 0]])
    assert torch.equal(values[:, :, :2], -PROMPT[[2, 2, 0]])
    assert torch.equal(keys[:, :, 2], torch.ones(3, 2, 2))
    cache.reset()
    assert cache.get_seq_length(1) == 0
    keys, values = cache.update(PROMPT[:2], PROMPT[:2], 1)
    assert (keys.data_ptr(), values.data_ptr()) == where
    assert torch.equal(keys, PROMPT[:2])


def assert_same_updates(cache: KeyValueCache, dynamic: DynamicCache, *all_states) -> None:
    for states in all_states:
        found = cache.update(states, -states, 0)
        expected = dynamic.update(states, -states, 0)
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    "more",
    [torch.cat([PROMPT, PROMPT]), torch.cat([PROMPT] * 3, dim=2)],
    ids=["sequences", "tokens"],
)
def test_overflowing_cache_matches_dynamic_cache(more):
    assert_same_updates(small_cache(), DynamicCache(), more, more[:, :, :1])


def test_cropping_an_overflowed_cache_matches_dynamic_cache():
    """Assisted decoding crops the tokens that it rejects."""
    cache = small_cache()
    dynamic = DynamicCache()
    assert_same_updates(cache, dynamic, PROMPT, PROMPT[:, :, :1], PROMPT)
    for each in (cache, dynamic):
        each.layers[0].crop(-2)
    assert_same_updates(cache, dynamic, PROMPT[:, :, :1] + 100)


def test_one_token_beyond_capacity_matches_dynamic_cache():
    states = (PROMPT, PROMPT, PROMPT[:, :, :1], PROMPT)
    assert_same_updates(small_cache(), DynamicCache(), *states)
