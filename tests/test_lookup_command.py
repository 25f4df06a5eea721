"""`fiddler-run --lookup`, and the server's requests."""

import json

import pytest
from command_line import SHIPPED_PLAN
from conftest import DEMO
from transformers import AutoTokenizer

from fiddler_run import cli
from fiddler_run.generation.defaults import GenerationDefaults
from fiddler_run.plan.schema import Plan
from fiddler_run.serving.bodies import CompletionBody
from fiddler_run.serving.requests import Defaults, Requests

LIST = "one two three four five six seven eight nine ten\n" * 3


def test_prompt_is_answered(capsys):
    flags = ["--plan", str(SHIPPED_PLAN), "--lookup", LIST, "--max-new-tokens", "12"]
    assert cli.main(flags) == 0
    out, err = capsys.readouterr()
    assert out.strip()
    assert "12 output tokens" in err


@pytest.mark.parametrize(
    "flags", [["--bench"], ["--perplexity", "x.txt"], ["--dry-run"]], ids=lambda each: each[0]
)
def test_other_uses_are_refused(flags, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--plan", str(SHIPPED_PLAN), "--lookup", *flags])
    assert ended.value.code == 2
    assert "--lookup applies only to a prompt, chat and server" in capsys.readouterr().err


def test_beams_are_refused_before_loading(capsys):
    flags = ["--plan", str(SHIPPED_PLAN), "--lookup", "--num-beams", "2", "Once upon a time"]
    assert cli.main(flags) == 1
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith("fiddler-run: --lookup: only for one sequence, without beams")
    assert not any("loading" in line for line in error)


@pytest.mark.parametrize("lookup", [False, True])
def test_requests_to_the_server_look_up_by_the_flag(lookup):
    plan = Plan.load(SHIPPED_PLAN)
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    requests = Requests(plan, tokenizer, 768, GenerationDefaults(), Defaults(lookup=lookup))
    body = CompletionBody.model_validate_json(json.dumps({"model": "x", "prompt": LIST}))
    assert requests.of_completion(body).options.lookup is lookup
