"""Routing profiles as files, and the probabilities that follow from them."""

import numpy as np
import pytest
from planning import small_model

from fiddler_opt.inputs.routing import Routing
from fiddler_opt.inputs.routing_profile import RoutingProfile
from fiddler_opt.measure.routing import RoutingTrace, routing_profile
from fiddler_run.errors import FiddlerError

SETS = {"stories.txt": 2, "code.jsonl": 3}  # prompts
SHAPE = small_model(num_layers=6, num_experts=8).shape
OUTPUT_TOKENS = 40
PROMPT_TOKENS = 20


@pytest.fixture(scope="module")
def profile() -> RoutingProfile:
    """Random choices of experts, whose popularity differs from prompt to prompt."""
    rng = np.random.default_rng(0)
    length = PROMPT_TOKENS + OUTPUT_TOKENS - 1
    prompts = sum(SETS.values())
    skew = rng.random((prompts, 1, 6, 8)) ** 2
    ranks = rng.random((prompts, length, 6, 8)) * skew
    trace = RoutingTrace(
        experts=ranks.argsort()[..., -2:].reshape(-1, 6, 2).astype(np.uint8),
        prompt=np.repeat(np.arange(prompts), length).astype(np.int32),
        decode=np.tile(np.arange(length) >= PROMPT_TOKENS, prompts),
        prompt_sets=np.repeat(range(len(SETS)), list(SETS.values())).astype(np.int32),
        set_names=list(SETS),
        fingerprint="",
    )
    return routing_profile(trace, SHAPE, "test", OUTPUT_TOKENS)


def test_profile_round_trips(profile):
    text = profile.dump()
    assert RoutingProfile.parse(text, "here") == profile
    lists = [line for line in text.splitlines() if "[" in line]
    assert len(lists) == 2 * 2 * 3 * 6  # sets, phases, keys, layers: one line each
    assert all(line.lstrip()[:3] in {f"{layer}: " for layer in range(6)} for line in lists)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "version: 2",
            "version: 1",
            "version: this release reads version 2, but the file says 1; remake it with",
        ),
        ("prompts: 2", "prompts: x", "sets.stories.txt.prompts"),
        ("prompts: 2", "prompts: 3", "sets.stories.txt.prefill.followers: .* expected"),
        (
            "        2: [",
            "        7: [",
            "sets.stories.txt.prefill.activations: needs exactly the layers 0 to 5",
        ),
        (
            "        0: [",
            "        0: [1, ",
            r"sets.stories.txt.prefill.activations\[0\]: 9 numbers, expected 8",
        ),
        (
            "output_tokens: 40",
            "output_tokens: 2",
            "sets.stories.txt.decode.tokens: .* at most 2 follow from recorded.output_tokens",
        ),
    ],
)
def test_inconsistent_profiles_are_refused(profile, old, new, message):
    text = profile.dump()
    assert old in text
    with pytest.raises(FiddlerError, match=message):
        RoutingProfile.parse(text.replace(old, new, 1), "here")


def test_counts_that_do_not_add_up_are_refused(profile):
    part = profile.sets["code.jsonl"].model_dump()
    chosen = part["decode"]["activations"][3]
    part["decode"]["reuse"][3][5] = chosen[5] + 1
    with pytest.raises(
        ValueError,
        match=rf"sets.code.jsonl.decode.reuse\[3\]\[5\]: {chosen[5] + 1} of {chosen[5]} choices",
    ):
        RoutingProfile.model_validate({**profile.model_dump(), "sets": {"code.jsonl": part}})
    chosen[0] += 1
    with pytest.raises(ValueError, match=r"sets.code.jsonl.decode.activations\[3\]: adds up to"):
        RoutingProfile.model_validate({**profile.model_dump(), "sets": {"code.jsonl": part}})


def test_sets_are_weighted_by_their_tokens(profile):
    model = small_model(num_layers=6, num_experts=8)
    everything = Routing.from_profile(profile, model, "file")
    stories, code = (Routing.from_profile(profile, model, "file", [name]) for name in SETS)
    assert Routing.from_profile(profile, model, "file", list(SETS)) == everything
    for phase in ("prefill", "decode"):
        weights = [getattr(part, phase).tokens for part in profile.sets.values()]
        for layer in range(6):
            expert = getattr(everything, phase).expert[layer]
            pair = getattr(everything, phase).pair[layer]
            assert sum(expert) == pytest.approx(2)
            assert sum(pair.values()) == pytest.approx(1)
            for e in range(8):
                assert sum(p for experts, p in pair.items() if e in experts) == pytest.approx(
                    expert[e]
                )
                each = [getattr(routing, phase).expert[layer][e] for routing in (stories, code)]
                assert expert[e] == pytest.approx(np.average(each, weights=weights))
    assert stories.decode.expert != stories.prefill.expert != code.prefill.expert
    with pytest.raises(
        FiddlerError,
        match="file: no set of prompts is named poems.txt; the sets are stories.txt, code.jsonl",
    ):
        Routing.from_profile(profile, model, "file", ["stories.txt", "poems.txt"])


@pytest.mark.parametrize("top_k", [1, 3])
def test_pairs_need_two_experts_per_token(top_k):
    data = two_tokens([0] * 4, [])
    data["model"]["num_experts_per_tok"] = top_k
    chosen = {1: [1, 1, 0, 0], 3: [2, 2, 1, 1]}[top_k]
    counts = data["sets"]["s"]["prefill"]
    data["sets"]["s"]["prefill"] = {**counts, "activations": {0: chosen}, "pairs": {}}
    data["sets"]["s"]["decode"] = {**data["sets"]["s"]["decode"], "pairs": {}}
    model = small_model(num_layers=1, num_experts_per_tok=top_k)
    routing = Routing.from_profile(RoutingProfile.model_validate(data), model, "file")
    assert routing.prefill.pair == [{}]
    assert sum(routing.prefill.expert[0]) == pytest.approx(top_k)
    data["sets"]["s"]["prefill"]["pairs"] = {0: [0] * 6}
    with pytest.raises(ValueError, match="sets.s.prefill.pairs: must be empty where a token does"):
        RoutingProfile.model_validate(data)


def test_uniform_routing_has_equal_probabilities():
    routing = Routing.uniform(small_model(num_experts=8))
    assert routing.prefill.expert[0] == routing.decode.expert[0] == [0.25] * 8
    assert sum(routing.decode.pair[0].values()) == pytest.approx(1)


def test_profile_of_another_model_is_refused(profile):
    with pytest.raises(
        FiddlerError, match="model.num_layers is 6, but small has 2: a profile of another model"
    ):
        Routing.from_profile(profile, small_model(), "file")


def two_tokens(activations: list[int], pairs: list[int]) -> dict:
    """A profile of two prompts of one token each, in one layer of four experts."""
    nothing = {
        "tokens": 0,
        "followers": 0,
        "activations": {0: [0] * 4},
        "pairs": {0: [0] * 6},
        "reuse": {0: [0] * 4},
    }
    prefill = {**nothing, "tokens": 2, "activations": {0: activations}, "pairs": {0: pairs}}
    return {
        "version": 2,
        "model": {"name": "m", "num_layers": 1, "num_experts": 4, "num_experts_per_tok": 2},
        "recorded": {"command": "by hand", "created": "2026-01-01", "output_tokens": 1},
        "sets": {"s": {"prompts": 2, "prefill": prefill, "decode": nothing}},
    }


def test_contradictory_counts_are_refused():
    RoutingProfile.model_validate(two_tokens([2, 1, 1, 0], [1, 1, 0, 0, 0, 0]))
    for activations, pairs, message in (
        ([3, 1, 0, 0], [2, 0, 0, 0, 0, 0], r"sets.s.prefill.activations\[0\]\[0\]: 3 of 2 tokens"),
        (
            [2, 1, 1, 0],
            [2, 0, 0, 0, 0, 0],
            r"pairs\[0\]: 2 hold expert 1, expected 1 for 1 choices of it",
        ),
        (
            [1, 1, 1, 1],
            [1, 1, 0, 0, 0, 0],
            r"pairs\[0\]: 2 hold expert 0, expected 1 for 1 choices of it",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            RoutingProfile.model_validate(two_tokens(activations, pairs))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_layers", 10**9),
        ("num_experts", 10**9),
        ("num_experts_per_tok", 5),
        ("num_layers", 10**400),
    ],
)
def test_absurd_model_sizes_are_refused(key, value):
    data = two_tokens([2, 1, 1, 0], [1, 1, 0, 0, 0, 0])
    data["model"][key] = value
    with pytest.raises(ValueError, match=f"model.{key}|model\n"):
        RoutingProfile.model_validate(data)


def test_too_many_pairs_are_not_listed():
    """Decode is then planned by expected work; the experts' probabilities stay the same."""
    routing = Routing.uniform(small_model(num_layers=2, num_experts=512))
    assert routing.decode.pair == [{}, {}]
    assert sum(routing.decode.expert[0]) == pytest.approx(2)
