"""Failing tokenizers and chat templates are refused in one line that names the way out."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import DEMO

from fiddler_run.errors import FiddlerError
from fiddler_run.generation.text import chat_text, load_tokenizer, token_ids


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
def test_failing_templates_are_refused(tmp_path, template):
    tokenizer = load_tokenizer(variant(tmp_path, chat_template=template))
    with pytest.raises(
        FiddlerError,
        match=(
            r"--chat: the model's chat template.* (refuses it: .*; change or remove it|have no"
            r" default; name one)"
        ),
    ) as refusal:
        chat_text(tokenizer, [{"role": "user", "content": "Hello"}], "--chat")
    assert "\n" not in str(refusal.value)


def test_empty_chat_text_is_refused(tmp_path):
    tokenizer = load_tokenizer(variant(tmp_path, chat_template="{% if false %}x{% endif %}"))
    text = chat_text(tokenizer, [{"role": "user", "content": "Hello"}], "--chat")
    with pytest.raises(FiddlerError, match="the prompt has no tokens"):
        token_ids(tokenizer, text, 100, 768, special_tokens=False)


def test_unencodable_prompts_are_refused(tmp_path):
    folder = variant(tmp_path)
    tokenizer_file = json.loads((folder / "tokenizer.json").read_text())
    mark = {**tokenizer_file["added_tokens"][0], "id": 768, "content": "<|im_start|>"}
    tokenizer_file["added_tokens"].append(mark)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_file))
    tokenizer = load_tokenizer(folder)
    with pytest.raises(
        FiddlerError,
        match=r"the token '<\|im_start\|>', number 768, but the model's embedding has 768 rows",
    ):
        token_ids(tokenizer, "<|im_start|>user", 100, 768)
    with pytest.raises(
        FiddlerError, match="has 10000000 characters, more than the context of 4096 tokens can hold"
    ):
        token_ids(tokenizer, "x" * 10**7, 4096, 768)
    with pytest.raises(FiddlerError, match="not UTF-8 text"):
        token_ids(tokenizer, "caf\udce9", 100, 768)
    assert token_ids(tokenizer, "Once", 100, 768)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("tokenizer.json", "{", "tokenizer.json: cannot read: not JSON"),
        ("tokenizer.json", "[" * 100_000, "nested too deeply"),
        ("tokenizer.json", "{}", "transformers cannot use its tokenizer"),
        ("tokenizer_config.json", "[]", "expected a JSON object, found list"),
    ],
    ids=lambda value: value[:9],
)
def test_damaged_tokenizer_files_are_refused(tmp_path, name, text, words):
    (variant(tmp_path) / name).write_text(text)
    assert_refused(tmp_path, words)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            lambda folder: (folder / "tokenizer.json").unlink(),
            "no tokenizer, neither tokenizer.json nor tokenizer.model",
        ),
        (
            lambda folder: (folder / "tokenizer.json").rename(folder / "tokenizer.model"),
            "needs the package sentencepiece: pip install sentencepiece",
        ),
    ],
)
def test_folders_without_a_tokenizer_are_refused(tmp_path, damage, words):
    damage(variant(tmp_path))
    assert_refused(tmp_path, words)


def assert_refused(folder: Path, words: str) -> None:
    with pytest.raises(FiddlerError) as refusal:
        load_tokenizer(folder)
    assert words in str(refusal.value)
    assert str(folder) in str(refusal.value)
    assert "\n" not in str(refusal.value)
