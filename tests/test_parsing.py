"""Untrusted YAML and JSON is parsed, or refused in one line."""

import pytest
from conftest import ROOT

from fiddler_run.errors import FiddlerError
from fiddler_run.plan.schema import Plan
from fiddler_run.system.parsing import parse_json, parse_yaml

HOSTILE_YAML = [
    "[" * 1000,
    "{a: " * 1000,
    "\n".join(" " * depth + "b:" for depth in range(200)),
    "a: &x [1]\nb: *x",
    'a: &a ["l"]\n'
    + "\n".join(
        f"{chr(98 + n)}: &{chr(98 + n)} [*{chr(97 + n)}, *{chr(97 + n)}]" for n in range(20)
    ),
    "? !!set {x}\n: 1",
    "a: !!int ''",
    "a: !!float ''",
    "a: !!bool x",
    "a: !!timestamp x",
    "a: !!python/object/apply:os.system [ls]",
    "a: 1:" + "59:" * 3000 + "1.5",
    'a: "\\UFFFFFFFF"',
    "a: " + "9" * 5000,
    "a: 0x" + "f" * 5000,
    "a: 2026-13-45",
    "a: 1\na: 2",
    "? [1, 2]\n: 3",
    "a: \0",
    "a: 'unfinished",
    "- a\nb: c",
]


@pytest.mark.parametrize("text", HOSTILE_YAML, ids=lambda text: text[:20])
def test_hostile_yaml_is_refused(text):
    with pytest.raises(FiddlerError) as refusal:
        parse_yaml(text, "here.yaml")
    assert str(refusal.value).startswith("here.yaml: not valid YAML: ")
    assert len(str(refusal.value)) < 500
    assert "\n" not in str(refusal.value)


def test_ordinary_yaml_is_parsed():
    text = "a: {1: [2, 0x10, 1.5e-3], x: null}\nb: 'x: y'\nc: 2026-11-23\n# comment\nd: |\n  text\n"
    assert parse_yaml(text, "here")["a"] == {1: [2, 16, 0.0015], "x": None}


@pytest.mark.parametrize(
    "text",
    ["", "{", "[" * 100_000, '{"a":' * 100_000, "9" * 5000, '"\\ud83d', "{'a': 1}"],
    ids=lambda text: text[:9],
)
def test_invalid_json_is_refused(text):
    with pytest.raises(FiddlerError, match="here: not JSON: .*; write it again") as refusal:
        parse_json(text, "here", "write it again")
    assert "\n" not in str(refusal.value)


def test_errors_name_the_kind_of_another_file():
    for path, kind in (
        ("profiles/two-cores.machine.yaml", "machine profile"),
        ("profiles/tiny-mixtral.routing.yaml", "routing profile"),
    ):
        with pytest.raises(FiddlerError, match=f"{path}: a {kind}, not a plan"):
            Plan.parse((ROOT / path).read_text(), path)
    with pytest.raises(FiddlerError, match="p: not a plan: expected a mapping of keys, found list"):
        Plan.parse("[1]", "p")
