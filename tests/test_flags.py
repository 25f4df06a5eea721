"""Flags of fiddler-run that are refused: incorrect ones, and those that would change nothing."""

import pytest
from command_line import SHIPPED_PLAN, assert_refused, run


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--plan", "p.yaml"],
        ["--plan", "p.yaml", "x", "--top-p", "2"],
        ["--plan", "p.yaml", "x", "--num-beams", "0"],
    ],
)
def test_usage_errors_exit_with_2(arguments, tmp_path):
    result = run("fiddler-run", *arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert "usage: fiddler-run" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--perplexity", "x", "--chat"], "--perplexity and --dry-run generate no text"),
        (["--dry-run", "--max-new-tokens", "9"], "--perplexity and --dry-run generate no text"),
        (["x", "--template", "chat.jinja"], "--template applies to a prompt only with --chat"),
        (["x", "--seed", "3"], "--top-p and --seed apply to a prompt only with --temperature"),
        (["x", "--temperature", "0", "--top-p", "0.5"], "only with --temperature above 0"),
        (["x", "--rank", "2"], "--rank applies only with --join"),
        (["--serve", "--api-key", "K", "--no-api-key"], "--api-key and --no-api-key exclude"),
    ],
)
def test_flags_that_would_change_nothing_are_refused(arguments, words, tmp_path):
    result = run("fiddler-run", "--plan", SHIPPED_PLAN, *arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert words in result.stderr


def test_listening_needs_several_ranks(tmp_path):
    flags = ("--plan", SHIPPED_PLAN, "--listen", "127.0.0.1:1", "x")
    assert_refused(run("fiddler-run", *flags, cwd=tmp_path), "--listen: the plan has a single rank")
