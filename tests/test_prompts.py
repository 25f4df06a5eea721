"""Every supported format of prompts."""

import json
import sys

import pytest

from fiddler_opt.measure.prompts import name_sets, read_prompts
from fiddler_run.errors import FiddlerError

ASKED = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]


def test_text_file_has_one_prompt_per_line(tmp_path):
    file = tmp_path / "p.txt"
    file.write_text("one\n\n two\x0cand more\r\n")
    assert read_prompts(file) == ["one", " two\x0cand more"]


@pytest.mark.parametrize(
    ("entry", "prompt"),
    [
        ("a\nb", "a\nb"),
        ("a\u2028b", "a\u2028b"),  # one line of JSON, two of str.splitlines()
        ({"prompt": "a", "text": "b"}, "a"),
        ({"prompt": None, "text": "b"}, "b"),
        ({"messages": ASKED}, ASKED),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": t} for t in "ab"]}
                ]
            },
            [ASKED[0] | {"content": "a\nb"}],
        ),
        (
            {
                "custom_id": "1",
                "url": "/v1/chat/completions",
                "body": {"model": "x", "messages": ASKED},
            },
            ASKED,
        ),
        (
            {
                "id": "1",
                "conversations": [
                    {"from": "human", "value": "Why?"},
                    {"from": "gpt", "value": "So."},
                ],
            },
            ASKED,
        ),
        (
            {"conversations": [{"from": "system", "value": ""}, *ASKED]},
            [{"role": "system", "content": ""}, *ASKED],
        ),
    ],
)
def test_json_prompts_are_read(tmp_path, entry, prompt):
    lines = tmp_path / "p.jsonl"
    array = tmp_path / "p.json"
    lines.write_text(json.dumps(entry, ensure_ascii=False) + '\n\n"last"\n', encoding="utf-8")
    array.write_text(json.dumps([entry, "last"], indent=1))
    assert read_prompts(lines) == read_prompts(array) == [prompt, "last"]


IMAGE = '{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}'


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.txt", "\n  \n", "p.txt: holds no prompt; "),
        ("p.json", "[]", "p.json: holds no prompt; "),
        ("p.jsonl", '"fine"\n\n{"prompt": 3}\n', "p.jsonl:3: no text; "),
        ("p.jsonl", "[1]\n", "p.jsonl:1: no text; "),
        ("p.jsonl", "{oops\n", "p.jsonl:1: not JSON: .*; write one JSON value per line"),
        (
            "p.json",
            '{"text": "a"}\n{"text": "b"}\n',
            "p.json: not JSON: .*; put one object per line in a .jsonl file",
        ),
        ("p.json", '{"text": "a"}', "p.json: not an array; "),
        ("p.json", '["fine", {"messages": []}]', "p.json: entry 2: no text; "),
        ("p.jsonl", '{"messages": [{"role": "user", "content": " "}]}', "p.jsonl:1: no text; "),
        ("p.jsonl", '{"messages": ["a"]}', 'p.jsonl:1: message 1: needs a "role" and a "content"'),
        (
            "p.jsonl",
            '{"conversations": [{"value": "a"}]}',
            'p.jsonl:1: message 1: needs a "role" and a "content"',
        ),
        ("p.jsonl", IMAGE, "p.jsonl:1: message 1: a part of its content is not text"),
        (
            "p.jsonl",
            r'"a\ud83d"',
            r"p.jsonl:1: not UTF-8 text: \\ud83d is half of a character; remove it",
        ),
    ],
)
def test_malformed_files_are_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(FiddlerError, match=message) as caught:
        read_prompts(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_saved_datasets_are_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    chats = datasets.Dataset.from_dict({"messages": [ASKED[:1], ASKED], "length": [1, 2]})
    texts = datasets.Dataset.from_dict({"text": ["a"]})
    chats.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": chats, "test": texts}).save_to_disk(tmp_path / "all")
    (tmp_path / "files" / "split=train").mkdir(parents=True)
    texts.to_parquet(tmp_path / "files" / "a.parquet")
    chats.to_parquet(tmp_path / "files" / "split=train" / "b.parquet")
    assert read_prompts(tmp_path / "one") == [ASKED[:1], ASKED]
    assert read_prompts(tmp_path / "all") == [ASKED[:1], ASKED, "a"]
    assert read_prompts(tmp_path / "files") == ["a", ASKED[:1], ASKED]


def test_malformed_datasets_are_refused(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": ["a", ""]}).save_to_disk(tmp_path / "gap")
    datasets.Dataset.from_dict({"question": ["a"]}).to_parquet(tmp_path / "other" / "x.parquet")
    for folder, file in (("torn", "x.parquet"), ("stateless", "state.json")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).write_text("{}")
    for folder, message in {
        "gap": "gap: row 2: no text; ",
        "other": 'x.parquet: no column "prompt", .* among question; ',
        "torn": "torn: cannot read the dataset: .*; write or download it again",
        "stateless": "stateless: cannot read the dataset: ",
    }.items():
        with pytest.raises(FiddlerError, match=message) as caught:
            read_prompts(tmp_path / folder)
        assert "\n" not in str(caught.value)


def test_only_dataset_folders_need_the_datasets_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it were not installed
    with pytest.raises(
        FiddlerError,
        match="neither a dataset written by `save_to_disk` nor a folder with parquet files; ",
    ):
        read_prompts(tmp_path)
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(FiddlerError, match="needs the package `datasets`: pip install datasets"):
        read_prompts(tmp_path)


def test_sets_are_named_by_file_or_path(tmp_path):
    paths = [tmp_path / "a" / "x.txt", tmp_path / "b" / "x.txt", tmp_path / "y.txt"]
    assert name_sets(paths) == {str(paths[0]): paths[0], str(paths[1]): paths[1], "y.txt": paths[2]}
    with pytest.raises(FiddlerError, match="y.txt is given twice"):
        name_sets([*paths, paths[2]])


@pytest.mark.parametrize("name", ["p.txt", "p.json", "p.jsonl"])
def test_byte_order_mark_is_dropped(tmp_path, name):
    text = {"p.txt": "Once\n", "p.json": '["Once"]', "p.jsonl": '"Once"\r\n'}[name]
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read_prompts(tmp_path / name) == ["Once"]


@pytest.mark.parametrize(("name", "where"), [("p.json", "p.json"), ("p.jsonl", "p.jsonl:1")])
def test_deeply_nested_json_is_refused(tmp_path, name, where):
    for text in ("[" * 100_000, '{"a":' * 100_000, "9" * 10_000):
        (tmp_path / name).write_text(text)
        with pytest.raises(FiddlerError, match=f"{where}: not JSON") as caught:
            read_prompts(tmp_path / name)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["tool_calls", "function_call"])
@pytest.mark.parametrize("content", [{"content": None}, {}])
def test_tool_call_without_content_has_empty_text(tmp_path, key, content):
    call = {"role": "assistant", key: [{"id": "1"}], **content}
    log = {
        "messages": [{"role": "user", "content": "2 + 2?"}, call, {"role": "tool", "content": "4"}]
    }
    (tmp_path / "p.jsonl").write_text(json.dumps(log))
    [messages] = read_prompts(tmp_path / "p.jsonl")
    assert [message["content"] for message in messages] == ["2 + 2?", "", "4"]
    log["messages"][1] = {"role": "assistant", key: None, **content}
    (tmp_path / "p.jsonl").write_text(json.dumps(log))
    with pytest.raises(FiddlerError, match=r'p.jsonl:1: message 2: needs a "role" and a "content"'):
        read_prompts(tmp_path / "p.jsonl")
