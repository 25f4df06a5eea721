"""Prompt lookup gives the tokens of plain decode, and refuses what it cannot serve."""

import json
import random
import threading

import pytest
import torch
from captures import record_on_any_device
from conftest import demo_shape, random_plan
from families import stock_model, tiny_config
from seeds import spread

from fiddler_run.errors import FiddlerError
from fiddler_run.generation.answer import Answer, Piece, Request, answer
from fiddler_run.generation.decode_step import DecodeStep
from fiddler_run.generation.generate import generate_ids
from fiddler_run.generation.grammar import ANY_OBJECT, Grammar
from fiddler_run.generation.lookup import MIN_MATCH, Occurrences, require_lookup
from fiddler_run.generation.lookup_gate import LookupGate
from fiddler_run.generation.sampling import Options

STORY = (
    "Once upon a time there was a cheerful rabbit named Pip. Pip lived in a farm. The wind was"
    " loud. Pip went for a walk."
)
COPIES = f"{STORY}\n\n{STORY[:80]}"  # goes on like the first copy
OTHER = "Once upon a time"


class AlwaysOpen(LookupGate):
    """Proposes a fixed number of tokens, whatever passes take."""

    def __init__(self, tokens: int = 5):
        super().__init__()
        self.tokens = tokens

    def draft_tokens(self) -> int:
        return self.tokens

    def record(self, drafted: int, accepted: int, seconds: float) -> None:
        pass


@pytest.fixture
def planned(place):
    model, tokenizer = place(random_plan(demo_shape(), random.Random(5), block_neurons=64))
    model.lookup_gate = AlwaysOpen()
    return model, tokenizer


def answered(
    planned, text: str | list[int], lookup: bool = True, tokens: int = 12, **request: object
) -> tuple[Answer, list[Piece]]:
    model, tokenizer = planned
    ids = tokenizer(text)["input_ids"] if isinstance(text, str) else text
    options = Options(tokens, lookup=lookup, **request.pop("options", {}))
    pieces: list[Piece] = []
    return answer(model, tokenizer, Request(ids, options, **request), pieces.append), pieces


def tokens_of(pieces: list[Piece]) -> list[int]:
    return [token.id for piece in pieces for token in piece.tokens]


def test_proposals_follow_the_longest_match():
    drawn = random.Random(1)
    proposed = 0
    for alphabet in (1, 2, 3) * 40:
        tokens = drawn.choices(range(alphabet), k=drawn.randint(0, 40))
        found = Occurrences(tokens).following(3)
        length = len(tokens)

        def match(place: int, tokens: list[int] = tokens) -> int:
            sizes = range(1, place + 1)
            return sum(tokens[place - size : place] == tokens[-size:] for size in sizes)

        best = max(((match(place), place) for place in range(length)), default=(0, 0))
        if best[0] < MIN_MATCH:
            assert found == []
        else:
            repeated = tokens + tokens[best[1] :] * 3
            assert found == repeated[best[1] : best[1] + 3]
            proposed += 1
    assert proposed > 20


def test_short_matches_propose_nothing():
    again = [*range(20), 99, *range(MIN_MATCH)]
    assert Occurrences(again).following(4) == [8, 9, 10, 11]
    assert Occurrences(again).following(0) == []
    assert Occurrences(again[:-1]).following(4) == []
    assert Occurrences([]).following(4) == []


@pytest.mark.parametrize("seed", spread([2, 1, 3], 1))
def test_greedy_tokens_are_those_of_plain_decode(place, seed):
    planned = place(random_plan(demo_shape(), random.Random(seed)))
    for text in (COPIES, OTHER):
        expected, pieces = answered(planned, text, lookup=False)
        planned[0].lookup_gate = AlwaysOpen(2**seed)
        found, same_pieces = answered(planned, text)
        assert tokens_of(same_pieces) == tokens_of(pieces)
        assert found.text == expected.text
        assert found.measured.output_tokens == expected.measured.output_tokens
        assert expected.measured.passes == expected.measured.output_tokens - 1
        if text is COPIES:
            assert found.measured.passes < expected.measured.passes
        else:
            assert found.measured.passes == expected.measured.passes


def test_measuring_gate_gives_the_same_tokens(planned):
    model, _ = planned
    expected, _ = answered(planned, COPIES, lookup=False)
    model.lookup_gate = LookupGate()
    assert answered(planned, COPIES)[0].text == expected.text


def test_sampled_tokens_are_those_of_plain_decode(planned):
    """Rejected proposals draw nothing."""
    passes = 0
    for seed in range(3):
        options = {"options": {"temperature": 0.7, "seed": seed}}
        expected, _ = answered(planned, COPIES, lookup=False, **options)
        found, _ = answered(planned, COPIES, **options)
        assert found.text == expected.text
        passes += expected.measured.passes - found.measured.passes
    assert passes > 0


def test_probabilities_and_grammars_work(planned):
    _, expected = answered(planned, COPIES, lookup=False, top_logprobs=2)
    _, pieces = answered(planned, COPIES, top_logprobs=2)
    pairs = [[token for piece in found for token in piece.tokens] for found in (expected, pieces)]
    for plain, token in zip(*pairs, strict=True):
        assert token.id == plain.id
        assert token.logprob == pytest.approx(plain.logprob, abs=1e-3)
        assert [*token.top] == [*plain.top]
    text = '{"a": [1, 2, 3, 4, 5, 6, 7, 8, 9], "b": [1, 2, 3, 4, 5, 6, 7, 8, 9]}\n' * 2
    options = {"options": {"temperature": 1.0, "seed": 3}, "grammar": Grammar(ANY_OBJECT, "x")}
    plain, _ = answered(planned, text, lookup=False, **options)
    found, _ = answered(planned, text, **options)
    assert found.text == plain.text
    if found.finish == "stop":
        json.loads(found.text)


def test_stop_strings_and_cancelling_end_within_a_pass(planned):
    model, tokenizer = planned
    whole, _ = answered(planned, COPIES, lookup=False)
    for start in (5, 12, 19):
        stop = whole.text[start : start + 4]
        plain, _ = answered(planned, COPIES, lookup=False, stop=(stop,))
        found, _ = answered(planned, COPIES, stop=(stop,))
        assert (found.text, found.finish) == (plain.text, "stop")
        assert found.measured.output_tokens == plain.measured.output_tokens
    cancelled = threading.Event()
    pieces = []

    def cancel_at_the_third(piece: Piece) -> None:
        pieces.append(piece)
        if len(pieces) == 3:
            cancelled.set()

    request = Request(tokenizer(COPIES)["input_ids"], Options(12, lookup=True))
    found = answer(model, tokenizer, request, cancel_at_the_third, cancelled)
    assert found.finish == "cancelled"
    assert found.measured.output_tokens <= 4


def test_prefix_is_reused_and_long_prompts_pass_in_chunks(planned):
    model, tokenizer = planned
    first = tokenizer(COPIES)["input_ids"]
    expected, pieces = answered(planned, first, lookup=False)
    spoken = tokens_of(pieces)
    turn = [*first, *spoken, *first[1:30]]
    model.plan = model.plan.model_copy(update={"prefill_chunk_tokens": 32})
    model.session.cache.tokens = []
    plain, _ = answered(planned, turn, lookup=False)
    for begun in (first, turn[:3]):
        model.session.cache.tokens = []
        assert begun is not first or answered(planned, begun)[0].text == expected.text
        found, _ = answered(planned, turn)
        assert found.text == plain.text
        assert found.measured.reused_tokens == (0 if begun is not first else len(turn) - 30)


def test_no_pass_exceeds_the_room(planned):
    """The last tokens are proposed only as far as they are wanted."""
    model, tokenizer = planned
    ids = tokenizer(COPIES)["input_ids"]
    ends = []

    def note(_, arguments, named):
        cached = named["past_key_values"].get_seq_length()
        ends.append(cached + named["input_ids"].shape[1])

    with model.model.register_forward_pre_hook(note, with_kwargs=True):
        for tokens in (1, 2, 5):
            model.lookup_gate = AlwaysOpen(16)
            ends.clear()
            found, _ = answered(planned, ids, tokens=tokens)
            assert found.measured.output_tokens == tokens
            assert max(ends) <= len(ids) + tokens - 1


def test_single_tokens_run_from_tapes(place, monkeypatch):
    model, tokenizer = place(random_plan(demo_shape("bfloat16"), random.Random(3)))
    record_on_any_device(model)
    model.lookup_gate = AlwaysOpen()
    served = []
    run_step = DecodeStep.__call__

    def count(self, **named):
        output = run_step(self, **named)
        served.append(output is not None)
        return output

    monkeypatch.setattr(DecodeStep, "__call__", count)
    found, _ = answered((model, tokenizer), OTHER, tokens=12)
    assert served == [True] * 11 == [True] * found.measured.passes


def test_batches_and_beams_are_refused(planned):
    model, _ = planned
    ids = torch.arange(3, 9).repeat(2, 1)
    with pytest.raises(FiddlerError, match="--lookup: only for one sequence, without beams"):
        generate_ids(model, ids, Options(4, lookup=True))
    with pytest.raises(FiddlerError, match="--lookup: only for one sequence, without beams"):
        generate_ids(model, ids[:1], Options(4, num_beams=2, lookup=True))


@pytest.mark.parametrize("family", ["qwen3_next", "cohere2_moe", "jamba"])
def test_caches_that_cannot_drop_tokens_are_refused(family):
    with pytest.raises(FiddlerError, match=f"--lookup: the cache of {family} cannot drop tokens"):
        require_lookup(stock_model(tiny_config(family)))
