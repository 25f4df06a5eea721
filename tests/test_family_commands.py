"""A family other than the demo's goes through all commands, without a GPU."""

import json

import pytest
import torch
from command_line import run
from families import stock_model, tiny_config
from test_families import save

from fiddler_opt.inputs.routing_profile import RoutingProfile

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}"
    "{% endfor %}<reply>"
)


@pytest.mark.slow
def test_profile_plan_run_and_chat_work_together(tmp_path):
    stock = stock_model(tiny_config("qwen3_moe"))
    with torch.no_grad():
        for layer in stock.model.layers:
            layer.mlp.gate.weight[:2] *= 4  # two experts are chosen more often
    save(stock.bfloat16(), tmp_path / "model")
    config = tmp_path / "model/tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "chat_template": TEMPLATE}))
    (tmp_path / "prompts.txt").write_text("Once upon a time\n3 + 4 =\nThe wind was loud.\n")

    def done(command: str, *arguments: object) -> str:
        result = run(command, *arguments, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        return result.stdout

    done("fiddler-opt", "profile", "--quick", "--force", "--model", "model", "--prompts",
         "prompts.txt", "--output-tokens", "4")  # fmt: skip
    routing = RoutingProfile.load(tmp_path / "profiles/model.routing.yaml")
    assert routing.model.num_experts == 8
    sizes = ("--prompt-tokens", "16", "--output-tokens", "16", "--max-seq-len", "128")
    done("fiddler-opt", "plan", "--model", "model", "--gpu-mem", "0GB", *sizes, "-o", "plan.yaml")
    run_it = ("fiddler-run", "--plan", "plan.yaml", "--max-new-tokens", "8")
    plain = done(*run_it, "Once upon a time")
    assert plain.strip()
    assert done(*run_it, "Once upon a time") == plain
    assert done(*run_it, "--chat", "Once upon a time") == done(
        *run_it, "<user>Once upon a time<reply>"
    )
