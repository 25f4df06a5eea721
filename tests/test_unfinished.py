"""What is kept of unfinished work, and what is removed when it is done."""

import pytest
import yaml
from test_commands import files_in

from fiddler_opt import unfinished
from fiddler_opt.unfinished import Unfinished, forget_unfinished, unfinished_path
from fiddler_run.errors import FiddlerError

MADE_WITH = {"shape": [1, 2], "torch": "2"}


def test_only_our_own_files_are_removed(tmp_path):
    """Not an editor's, nor those of a name that glob characters would fit."""
    target = tmp_path / "m[ab].yaml"
    ours = [
        ".m[ab].yaml.unfinished",
        ".m[ab].yaml.0123456789abcdef.partial",
        "..m[ab].yaml.unfinished.0123456789abcdef.partial",
    ]
    others = [
        "m[ab].yaml",
        ".m[ab].yaml.swp",
        ".m[ab].yaml.partial",
        ".m[ab].yaml.unfinished.swp",
        "..m[ab].yaml.x",
        ".ma.yaml.unfinished",
        ".mb.yaml.unfinished",
        ".ma.yaml.0123456789abcdef.partial",
        ".m[ab].yaml.2.unfinished",
    ]
    for name in ours + others:
        (tmp_path / name).write_text("x")
    forget_unfinished(target)
    assert sorted(files_in(tmp_path)) == sorted(others)
    forget_unfinished(target)


def test_parts_are_found_again(tmp_path):
    target = tmp_path / "m.yaml"
    shared = [1.5, 2.0]
    made = {"a": {"times": shared, "again": shared}, "b": shared}
    first = Unfinished(target, MADE_WITH)
    for name, part in made.items():
        first.part(name, lambda part=part: part)
    second = Unfinished(target, dict(MADE_WITH))
    assert second.parts == made
    assert second.part("a", lambda: pytest.fail("made again")) == made["a"]
    assert Unfinished(target, {**MADE_WITH, "torch": "3"}).parts == {}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"[1, 2",
        b"x",
        b"- 1",
        b"[" * 5000,
        yaml.safe_dump({"made_with": MADE_WITH}).encode(),
        yaml.safe_dump({"made_with": MADE_WITH, "parts": [1]}).encode(),
        b"a: &a [1, 1]\nmade_with: *a\n",
        b"made_with: 2026-13-45",
    ],
)
def test_what_is_wrong_with_them_is_no_error(tmp_path, content):
    target = tmp_path / "m.yaml"
    unfinished_path(target).write_bytes(content)
    found = Unfinished(target, MADE_WITH)
    assert found.parts == {}
    assert found.part("a", lambda: 1) == 1
    assert Unfinished(target, MADE_WITH).parts == {"a": 1}


def test_parts_that_may_not_be_read(tmp_path, monkeypatch):
    target = tmp_path / "m.yaml"
    unfinished_path(target).write_text("x")

    def closed(path, _):
        raise FiddlerError(f"{path}: cannot read: Permission denied")

    monkeypatch.setattr(unfinished, "read_bytes", closed)
    with pytest.raises(FiddlerError, match="m.yaml.unfinished: cannot read: Permission denied"):
        Unfinished(target, MADE_WITH)
