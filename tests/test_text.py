"""Text as it comes is the text as a whole, whatever the tokenizer; what a tokenizer or a template fails on is one line."""

import json
import random
import shutil
from pathlib import Path

import pytest
from conftest import DEMO
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fiddler_run.errors import FiddlerError
from fiddler_run.text import TextStream, answer_text, chat_text, load_tokenizer, token_ids

ALPHABET = ["a", "b", " ", "  ", "\n", "\n\n", "\t", "é", "ß", "日", "本", "🙂", "👩‍👧", "\u200b", ".", "'", "<s>x", "0"]


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """Decodes as Llama's and Mixtral's tokenizers do: a leading space is stripped, unknown characters are bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "c", ".", "▁a", "▁b", "ab"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocabulary, [("▁", "a"), ("▁", "b"), ("a", "b")], unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = decoders.Strip(content=" ", left=1, right=0)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def metaspace() -> PreTrainedTokenizerFast:
    """As newer conversions of sentencepiece do, with a token in the middle that is not special."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", ".", "▁a"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocabulary, [("▁", "a")], unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    strip = decoders.Strip(content=" ", left=1, right=0)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    backend.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


TOKENIZERS = {
    "byte-level": lambda: AutoTokenizer.from_pretrained(DEMO),
    "sentencepiece-like": sentencepiece_like,
    "metaspace": metaspace,
}


def streamed(tokenizer, prompt: list[int], answer: list[int]) -> list[str]:
    stream = TextStream(tokenizer, prompt)
    return [*(stream.put(token) for token in answer), stream.finish()]


def test_spaces_after_a_newline_stay():
    tokenizer = sentencepiece_like()
    ids = tokenizer("a\nb\n\n c", add_special_tokens=False)["input_ids"]
    assert "".join(streamed(tokenizer, [], ids)) == "a\nb\n\n c"
    # After a prompt, the answer's first space is part of it.
    prompt, answer = ids[:2], tokenizer(" b", add_special_tokens=False)["input_ids"][1:]
    assert "".join(streamed(tokenizer, prompt, answer)) == " b" == answer_text(tokenizer, prompt, answer)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_pieces_are_the_whole(kind):
    """Random texts, cut between any two tokens into a prompt and an answer."""
    tokenizer, rng = TOKENIZERS[kind](), random.Random(0)
    for _ in range(150):
        text = "".join(rng.choices(ALPHABET, k=rng.randint(1, 30)))
        ids = tokenizer(text)["input_ids"]
        cut = rng.randint(0, len(ids))
        prompt, answer = ids[:cut], ids[cut:]
        before = tokenizer.decode(prompt, skip_special_tokens=True)
        whole = tokenizer.decode(ids, skip_special_tokens=True)
        pieces = streamed(tokenizer, prompt, answer)
        assert "".join(pieces) == answer_text(tokenizer, prompt, answer)
        if whole.startswith(before):  # not where the cut goes through a character
            assert "".join(pieces) == whole.removeprefix(before)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_random_tokens_and_special_ones(kind):
    """What no text encodes to: halves of characters, end tokens in the middle."""
    tokenizer, rng = TOKENIZERS[kind](), random.Random(1)
    for _ in range(150):
        ids = [rng.randrange(len(tokenizer)) for _ in range(rng.randint(2, 24))]
        cut = rng.randint(1, len(ids))
        assert "".join(streamed(tokenizer, ids[:cut], ids[cut:])) == answer_text(tokenizer, ids[:cut], ids[cut:])


def test_text_comes_as_soon_as_it_is_certain():
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    ids = tokenizer("Once there was 日 a bear", add_special_tokens=False)["input_ids"]
    pieces = streamed(tokenizer, ids[:1], ids[1:])
    assert pieces[-1] == ""
    assert not any("�" in piece for piece in pieces)
    assert sum(piece == "" for piece in pieces[:-1]) == 2  # two of the character's three bytes


def test_a_decoder_that_changes_what_it_has_said(monkeypatch):
    """Then the rest comes at the end."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    ids = tokenizer("Once upon a time there was", add_special_tokens=False)["input_ids"]
    stream = TextStream(tokenizer, ids[:2])
    pieces = [stream.put(ids[2])]

    class Broken:
        def step(self, *_):
            raise Exception("Invalid prefix encountered")

    stream._stream = Broken()
    pieces += [stream.put(token) for token in ids[3:]]
    assert pieces[1:] == [""] * (len(ids) - 3)
    assert "".join([*pieces, stream.finish()]) == answer_text(tokenizer, ids[:2], ids[2:])


def variant(folder: Path, **changes) -> Path:
    """A copy of the demo's tokenizer with other values in tokenizer_config.json."""
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(DEMO / name, folder / name)
    config = json.loads((DEMO / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, **changes}))
    return folder


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no') }}",
        "{% for m in messages %}{{ m.content }",
        "{{ messages[0].content | nofilter }}",
        "{{ messages[0].content.nope.x }}",
        "{{ 1 / 0 }}",
        "{% for i in range(10 ** 12) %}x{% endfor %}",
        [{"name": "rag", "template": "x"}, {"name": "tool_use", "template": "y"}],
    ],
    ids=str,
)
def test_templates_that_fail(tmp_path, template):
    tokenizer = load_tokenizer(variant(tmp_path, chat_template=template))
    with pytest.raises(
        FiddlerError, match=r"--chat: the model's chat template.* (refuses it: .*; change or remove it|have no default; name one)"
    ) as refusal:
        chat_text(tokenizer, [{"role": "user", "content": "Hello"}], "--chat")
    assert "\n" not in str(refusal.value)


def test_a_template_that_writes_nothing(tmp_path):
    tokenizer = load_tokenizer(variant(tmp_path, chat_template="{% if false %}x{% endif %}"))
    text = chat_text(tokenizer, [{"role": "user", "content": "Hello"}], "--chat")
    with pytest.raises(FiddlerError, match="the prompt has no tokens"):
        token_ids(tokenizer, text, 100, 768, special_tokens=False)


def test_prompts_that_cannot_be_encoded(tmp_path):
    folder = variant(tmp_path)
    tokenizer_file = json.loads((folder / "tokenizer.json").read_text())
    mark = {**tokenizer_file["added_tokens"][0], "id": 768, "content": "<|im_start|>"}
    tokenizer_file["added_tokens"].append(mark)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_file))
    tokenizer = load_tokenizer(folder)
    with pytest.raises(FiddlerError, match=r"the token '<\|im_start\|>', number 768, but the model's embedding has 768 rows"):
        token_ids(tokenizer, "<|im_start|>user", 100, 768)
    with pytest.raises(FiddlerError, match="has 10000000 characters, more than the context of 4096 tokens can hold"):
        token_ids(tokenizer, "x" * 10**7, 4096, 768)
    with pytest.raises(FiddlerError, match="not UTF-8 text"):
        token_ids(tokenizer, "caf\udce9", 100, 768)
    assert token_ids(tokenizer, "Once", 100, 768)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "tokenizer.json: cannot read: not JSON"),
        (lambda folder: (folder / "tokenizer.json").write_text("[" * 100_000), "nested too deeply"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "transformers cannot use its tokenizer"),
        (lambda folder: (folder / "tokenizer_config.json").write_text("[]"), "expected a JSON object, found list"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer, neither tokenizer.json nor tokenizer.model"),
        (
            lambda folder: (folder / "tokenizer.json").rename(folder / "tokenizer.model"),
            "needs the package sentencepiece: pip install sentencepiece",
        ),
    ],
)
def test_damaged_tokenizers(tmp_path, damage, words):
    damage(variant(tmp_path))
    with pytest.raises(FiddlerError) as refusal:
        load_tokenizer(tmp_path)
    assert words in str(refusal.value)
    assert str(tmp_path) in str(refusal.value)
    assert "\n" not in str(refusal.value)
