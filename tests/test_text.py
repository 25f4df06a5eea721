"""The pieces of a streamed text add up to the whole text, with any tokenizer."""

import random

import pytest
from conftest import DEMO
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fiddler_run.generation.text import TextStream, answer_text

ALPHABET = [
    *("a", "b", " ", "  ", "\n", "\n\n", "\t", ".", "'", "<s>x", "0"),
    *("é", "ß", "日", "本", "🙂", "👩‍👧", "\u200b"),
]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
BYTES = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]


def byte_fallback(pieces: list[str], merges: list[tuple[str, str]]) -> Tokenizer:
    """A tokenizer of these pieces and all bytes, which strips an answer's leading space."""
    vocabulary = {piece: number for number, piece in enumerate([*BYTES, *pieces])}
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    strip = decoders.Strip(content=" ", left=1, right=0)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip]
    )
    return backend


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """Decodes as Llama's and Mixtral's tokenizers do: a leading space is stripped, unknown
    characters are bytes.
    """
    pieces = ["▁", "a", "b", "c", ".", "▁a", "▁b", "ab"]
    backend = byte_fallback(pieces, [("▁", "a"), ("▁", "b"), ("a", "b")])
    spaces = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    backend.normalizer = normalizers.Sequence(spaces)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL)


def metaspace() -> PreTrainedTokenizerFast:
    """Decodes as newer conversions of sentencepiece do, with an added token that is not special."""
    backend = byte_fallback(["▁", "a", "b", ".", "▁a"], [("▁", "a")])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL)


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
    # After a prompt, the answer keeps its leading space.
    prompt = ids[:2]
    answer = tokenizer(" b", add_special_tokens=False)["input_ids"][1:]
    assert "".join(streamed(tokenizer, prompt, answer)) == " b"
    assert answer_text(tokenizer, prompt, answer) == " b"


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_pieces_add_up_to_the_whole_text(kind):
    """Random texts, cut between any two tokens into a prompt and an answer."""
    tokenizer = TOKENIZERS[kind]()
    rng = random.Random(0)
    for _ in range(150):
        text = "".join(rng.choices(ALPHABET, k=rng.randint(1, 30)))
        ids = tokenizer(text)["input_ids"]
        cut = rng.randint(0, len(ids))
        prompt = ids[:cut]
        answer = ids[cut:]
        before = tokenizer.decode(prompt, skip_special_tokens=True)
        whole = tokenizer.decode(ids, skip_special_tokens=True)
        pieces = streamed(tokenizer, prompt, answer)
        assert "".join(pieces) == answer_text(tokenizer, prompt, answer)
        if whole.startswith(before):  # unless the cut splits a character
            assert "".join(pieces) == whole.removeprefix(before)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_pieces_of_random_tokens_add_up_too(kind):
    """No text encodes to these: partial characters, end tokens in the middle."""
    tokenizer = TOKENIZERS[kind]()
    rng = random.Random(1)
    for _ in range(150):
        ids = [rng.randrange(len(tokenizer)) for _ in range(rng.randint(2, 24))]
        cut = rng.randint(1, len(ids))
        assert "".join(streamed(tokenizer, ids[:cut], ids[cut:])) == answer_text(
            tokenizer, ids[:cut], ids[cut:]
        )


def test_text_is_streamed_as_soon_as_it_is_certain():
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    ids = tokenizer("Once there was 日 a bear", add_special_tokens=False)["input_ids"]
    pieces = streamed(tokenizer, ids[:1], ids[1:])
    assert pieces[-1] == ""
    assert not any("�" in piece for piece in pieces)
    assert sum(piece == "" for piece in pieces[:-1]) == 2  # two of the character's three bytes


def test_failing_decoder_delays_the_rest_to_the_end(monkeypatch):
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
