"""Encoding of prompts as tokens."""

import pytest
from conftest import DEMO
from transformers import AutoTokenizer

from fiddler_opt.measure.prompts import encode_prompts
from fiddler_run.errors import FiddlerError

ASKED = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt"
    " %}<assistant>{% endif %}"
)


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO)


def test_messages_go_through_the_chat_template(tokenizer):
    plain = tokenizer("Why?\nSo.")["input_ids"]
    assert encode_prompts(tokenizer, [ASKED, "Why?\nSo."], 100, "p") == [plain, plain]
    tokenizer.chat_template = CHAT
    # only a final question gets a generation prompt
    expected = [
        "<user>Why?<assistant>So.",
        "<user>Why?<assistant>",
    ]
    asked, question = encode_prompts(tokenizer, [ASKED, ASKED[:1]], 100, "p")
    assert [tokenizer.decode(asked), tokenizer.decode(question)] == expected
    tokenizer.chat_template = "{{ raise_exception('roles must\nalternate') }}"
    with pytest.raises(
        FiddlerError,
        match="p: prompt 2: the model's chat template refuses it: roles must alternate; change or",
    ):
        encode_prompts(tokenizer, ["fine", ASKED], 100, "p")


def test_too_long_or_empty_prompts_are_refused(tokenizer):
    with pytest.raises(
        FiddlerError,
        match="file: prompt 2 has 301 tokens, more than the context of 256; shorten it",
    ):
        encode_prompts(tokenizer, ["short", "1" * 300], 256, "file")
    tokenizer.chat_template = "{# nothing #}"
    with pytest.raises(FiddlerError, match="file: prompt 1 has no tokens; remove it"):
        encode_prompts(tokenizer, [[{"role": "user", "content": ""}]], 256, "file")


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.content }",
        "{{ messages[0].content | nofilter }}",
        "{{ messages[0].content.nope.x }}",
        "{{ 1 // 0 }}",
        "{{ messages + 1 }}",
        "{{ [].pop() }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_failing_templates_are_refused(tokenizer, template):
    tokenizer.chat_template = template
    with pytest.raises(
        FiddlerError, match="p: prompt 1: the model's chat template refuses it: .+; change or"
    ) as caught:
        encode_prompts(tokenizer, [ASKED], 256, "p")
    assert "\n" not in str(caught.value)


def test_templates_without_a_default_are_refused(tokenizer):
    tokenizer.chat_template = {"rag": CHAT, "tool_use": CHAT}
    with pytest.raises(
        FiddlerError, match=r"p: prompt 1: .* templates \(rag, tool_use\) have no default; name one"
    ):
        encode_prompts(tokenizer, [ASKED], 256, "p")
    tokenizer.chat_template = {"default": CHAT, "rag": "{{ 1 // 0 }}"}
    assert (
        tokenizer.decode(encode_prompts(tokenizer, [ASKED], 256, "p")[0])
        == "<user>Why?<assistant>So."
    )


def test_failing_tokenizer_is_refused():
    class Broken:
        def get_vocab(self):
            return {"a": 0}

        def __call__(self, *_, **__):
            raise Exception("data did not match\nany variant")

    with pytest.raises(
        FiddlerError,
        match="p: prompt 1: the model's tokenizer fails: data did not match any variant; ",
    ):
        encode_prompts(Broken(), ["a"], 16, "p")


def test_oversized_prompt_is_refused_before_tokenizing(tokenizer, monkeypatch):
    longest = max(map(len, tokenizer.get_vocab()))
    monkeypatch.setattr(type(tokenizer), "__call__", None)
    for prompt in ("x" * (16 * longest + 1), [{"role": "user", "content": "x" * 10_000_000}]):
        with pytest.raises(
            FiddlerError,
            match="p: prompt 1 has .* characters, more than the context of 16 tokens can hold",
        ):
            encode_prompts(tokenizer, [prompt], 16, "p")
