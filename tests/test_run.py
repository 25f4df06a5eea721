"""`fiddler-run`: prompts on stdin, plans from a pipe, odd numbers, and busy machines."""

import os
import sys

import pytest
from command_line import SHIPPED_PLAN
from conftest import DEMO

from fiddler_run import cli
from fiddler_run.cli import busy_note
from fiddler_run.errors import FiddlerError


def test_closed_stdin_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", None)
    assert cli.main(["--plan", "plans/demo.yaml", "-"]) == 1
    assert "the prompt should come from stdin, but stdin is closed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xef\xbb\xbfOnce upon a time\n", None),
        (b"caf\xe9", "not UTF-8 text"),
        (b"x" * 64_000_001, "larger than 64 MB"),
    ],
)
def test_stdin_is_read_as_utf8_text(monkeypatch, tmp_path, content, words):
    path = tmp_path / "stdin"
    path.write_bytes(content)
    with path.open() as file:
        monkeypatch.setattr(sys, "stdin", file)
        if words is None:
            assert cli.read_stdin() == "Once upon a time"
            return
        with pytest.raises(FiddlerError, match=words):
            cli.read_stdin()


def test_plan_from_a_pipe_is_read_once(capsys):
    reading, writing = os.pipe()
    os.write(writing, SHIPPED_PLAN.read_bytes())
    os.close(writing)
    plan = f"/dev/fd/{reading}"
    assert cli.main(["--plan", plan, "--model", str(DEMO), "Once", "--max-new-tokens", "3"]) == 0
    os.close(reading)
    assert capsys.readouterr().out.startswith(" ")


def test_answer_fills_the_rest_of_the_context(capsys):
    """Without --max-new-tokens, a prompt that fits is never refused for its answer's length."""
    prompt = "Once upon a time there was a bear. " * 48
    assert cli.main(["--plan", "plans/demo.yaml", prompt]) == 0
    assert "output tokens" in capsys.readouterr().err
    assert cli.main(["--plan", "plans/demo.yaml", prompt, "--max-new-tokens", "112"]) == 1
    assert "together more than the plan's context of 512" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [
        ["--temperature", "1e-300"],
        ["--temperature", "nan"],
        ["--temperature", "-1"],
        ["--max-new-tokens", "9" * 400],
    ],
)
def test_absurd_numbers_are_usage_errors(flags, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--plan", "plans/demo.yaml", "Once", *flags])
    assert ended.value.code == 2
    assert flags[0] in capsys.readouterr().err


def test_note_names_cores_taken_by_other_programs():
    assert busy_note(None, 2, 2) is None
    assert busy_note(0.1, 2, 2) is None
    assert busy_note(1.0, 8, 4) is None  # there are cores left
    assert busy_note(1.0, 2, 2).startswith(
        "note: other programs used 1.0 of 2 cores, and the plan needs 2"
    )
