"""Answers: stop strings, probabilities, grammars, cancelling, and a reused prefix."""

import json
import random
import threading

import pytest
import torch
from conftest import demo_shape, random_plan

from fiddler_run.errors import FiddlerError
from fiddler_run.generation.answer import Answer, Piece, Request, answer
from fiddler_run.generation.grammar import Grammar
from fiddler_run.generation.sampling import Options
from fiddler_run.generation.stop_strings import StopStrings

TEXT = "Once upon a time there was a kind bear"
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 1, "maximum": 99},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture
def planned(place):
    return place(random_plan(demo_shape(), random.Random(5), block_neurons=64))


def answered(planned, text: str | list[int], **request: object) -> tuple[Answer, list[Piece]]:
    """The answer to a prompt, and its pieces."""
    model, tokenizer = planned
    ids = tokenizer(text)["input_ids"] if isinstance(text, str) else text
    options = request.pop("options", Options(12))
    pieces: list[Piece] = []
    return answer(model, tokenizer, Request(ids, options, **request), pieces.append), pieces


def test_stop_strings_cut_the_text_wherever_it_is_divided():
    drawn = random.Random(3)
    for _ in range(300):
        text = "".join(drawn.choices("ab<|", k=20))
        strings = tuple("".join(drawn.choices("ab<|", k=drawn.randint(1, 4))) for _ in range(2))
        places = [at for each in strings if (at := text.find(each)) >= 0]
        expected = text[: min(places)] if places else text
        stop = StopStrings(strings)
        found = ""
        rest = text
        while rest and not stop.found:
            size = drawn.randint(1, 6)
            found += stop.put(rest[:size])
            assert expected.startswith(found)
            rest = rest[size:]
        found += stop.finish()
        assert found == expected
        assert stop.found == bool(places)


def test_answer_ends_before_a_stop_string(planned):
    whole, _ = answered(planned, TEXT)
    assert whole.finish == "length"
    stop = whole.text[9:14]
    cut, pieces = answered(planned, TEXT, stop=("no such text", stop))
    assert cut.finish == "stop"
    assert cut.text == "".join(piece.text for piece in pieces) == whole.text.partition(stop)[0]


def test_probabilities_are_the_models(planned, stock):
    """Before temperature, for the tokens of a sampled answer."""
    model, tokenizer = planned
    options = Options(6, temperature=2.0, seed=4)
    found, pieces = answered(planned, TEXT, options=options, top_logprobs=3)
    tokens = [token for piece in pieces for token in piece.tokens]
    assert "".join(piece.text for piece in pieces) == found.text
    prompt = tokenizer(TEXT)["input_ids"]
    ids = torch.tensor([[*prompt, *(token.id for token in tokens)]])
    expected = stock.logits(ids.to(model.device), torch.ones_like(ids).to(model.device))
    logprobs = expected[0].float().log_softmax(dim=-1).cpu()
    for place, token in enumerate(tokens, len(prompt) - 1):
        assert token.logprob == pytest.approx(float(logprobs[place, token.id]), abs=1e-3)
        assert [*token.top] == logprobs[place].topk(3).indices.tolist()
        assert token.top[next(iter(token.top))] == pytest.approx(float(logprobs[place].max()), 1e-3)


def test_grammar_gives_json_of_the_schema(planned):
    for seed in range(4):
        options = Options(60, temperature=1.0, seed=seed)
        found, _ = answered(planned, TEXT, options=options, grammar=Grammar(PERSON, "schema"))
        assert found.finish == "stop"
        person = json.loads(found.text)
        assert person.keys() == {"name", "age"}
        assert 1 <= person["age"] <= 99


@pytest.mark.parametrize("schema", [{"type": "nonsense"}, {"$ref": "#/no"}, {"pattern": "("}])
def test_incorrect_schema_is_refused(schema):
    with pytest.raises(FiddlerError, match="^where: .*correct the schema$"):
        Grammar({**schema, "title": "x"}, "where")


def test_cancelled_answer_ends_within_a_token(planned):
    model, tokenizer = planned
    cancelled = threading.Event()
    pieces = []

    def cancel_at_the_third(piece: Piece) -> None:
        pieces.append(piece)
        if len(pieces) == 3:
            cancelled.set()

    request = Request(tokenizer(TEXT)["input_ids"], Options(100))
    found = answer(model, tokenizer, request, cancel_at_the_third, cancelled)
    assert found.finish == "cancelled"
    assert found.measured.output_tokens <= 4
    assert answered(planned, TEXT)[0].text.startswith(found.text)


def test_shared_prefix_is_not_computed_again(planned):
    """The text is that of a fresh cache: continued, branched off, shortened, in chunks."""
    model, tokenizer = planned
    first = tokenizer(TEXT)["input_ids"]
    options = Options(6)
    text = answered(planned, TEXT, options=options)[0].text
    spoken = tokenizer(text, add_special_tokens=False)["input_ids"]
    more = tokenizer(" The bear said: " * 12, add_special_tokens=False)["input_ids"]
    turns = [
        (first, 0),
        ([*first, *spoken, *more[:5]], len(first) + len(spoken) - 1),
        ([*first, *spoken[:4], *more[:9]], len(first) + 4),
        (first, len(first) - 1),
        (first[:5], 4),
        ([*first[:5], *more], 5),
        ([*first[:5], *more, *more[:9]], 5 + len(more)),
        ([*more, *more[:3]], 0),
    ]
    model.plan = model.plan.model_copy(update={"prefill_chunk_tokens": 32})
    expected = []
    for ids, _ in turns:
        model.session.cache.tokens = []
        expected.append(answered(planned, ids, options=options)[0].text)
    model.session.cache.tokens = []
    for (ids, reused), text in zip(turns, expected, strict=True):
        found, _ = answered(planned, ids, options=options)
        assert found.text == text
        assert found.measured.reused_tokens == reused


def test_other_generations_do_not_disturb_a_reused_prefix(planned):
    model, tokenizer = planned
    expected, _ = answered(planned, TEXT)
    ids = tokenizer("def count", return_tensors="pt").to(model.device)["input_ids"]
    model.generate(ids, max_new_tokens=4, do_sample=False)
    found, _ = answered(planned, TEXT)
    assert found.text == expected.text
    assert found.measured.reused_tokens == 0


def test_nested_generation_does_not_disturb_an_answer(planned):
    model, tokenizer = planned
    ids = tokenizer("def count", return_tensors="pt").to(model.device)["input_ids"]
    request = Request(tokenizer(TEXT)["input_ids"], Options(12))

    def generate(piece: Piece) -> None:
        model.generate(ids, max_new_tokens=2, do_sample=False)

    expected, _ = answered(planned, TEXT)
    for _ in range(2):
        assert answer(model, tokenizer, request, generate).text == expected.text


def test_prefix_of_other_weights_is_not_reused(planned):
    model, _ = planned
    answered(planned, TEXT)
    norm = model.model.norm
    kept = norm.weight
    norm.weight = torch.nn.Parameter(kept.flip(0).clone(), requires_grad=False)
    try:
        assert answered(planned, TEXT)[0].measured.reused_tokens == 0
    finally:
        norm.weight = kept


def test_failed_answer_leaves_nothing_to_reuse(planned):
    model, tokenizer = planned
    expected, _ = answered(planned, TEXT)

    def fail(piece: Piece) -> None:
        raise KeyError

    with pytest.raises(KeyError):
        answer(model, tokenizer, Request(tokenizer(TEXT)["input_ids"], Options(5)), fail)
    found, _ = answered(planned, TEXT)
    assert found.text == expected.text
