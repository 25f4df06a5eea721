"""Every family that transformers dispatches: the same answers as the stock model."""

import random
import shutil
from pathlib import Path

import pytest
import torch
from conftest import DEMO, make_plan
from families import FAMILIES, stock_model, tiny_config

from fiddler_run import load_model
from fiddler_run.models.config import ModelConfig
from fiddler_run.models.measured import described
from fiddler_run.plan.schema import Plan

COMMON = ("mixtral", "qwen3_moe", "qwen3_next", "glm4_moe", "glm4_moe_lite", "granitemoe", "phimoe")
PROMPT = torch.tensor([[3, 17, 42, 5, 88, 23, 9, 31, 77, 12]])
PADDED = torch.tensor([[0, 0, 0, 42, 5, 88], [7, 3, 17, 42, 11, 2]])
ALL = [pytest.param(name, marks=() if name in COMMON else pytest.mark.slow) for name in FAMILIES]


class Case:
    """A family's stock model, and the same checkpoint run by a random plan."""

    def __init__(self, model_type: str, folder: Path):
        self.config = tiny_config(model_type)
        self.stock = stock_model(self.config)
        self.stock.save_pretrained(folder)
        for file in DEMO.glob("tokenizer*"):
            shutil.copy(file, folder)
        self.plan = random_plan(folder, model_type)
        self.ours, _ = load_model(self.plan, folder)

    def generations(self, *inputs, **arguments) -> list[torch.Tensor | type]:
        """Both models' tokens, or the type of what they raise."""
        found = []
        for model in (self.stock, self.ours):
            try:
                found.append(model.generate(*inputs, do_sample=False, **arguments))
            except Exception as error:
                found.append(type(error))
        return found


def random_plan(folder: Path, seed: str) -> Plan:
    config = ModelConfig.read(folder / "config.json")
    _, shape, _ = described(config, str(folder), "float32")
    blocks = -(-shape.intermediate_size // 32)
    drawn = random.Random(seed)
    resident = [
        [drawn.randint(0, blocks) for _ in range(shape.num_experts)]
        for _ in range(shape.num_layers)
    ]
    return make_plan(shape, resident, share={1: drawn.random()})


@pytest.fixture(scope="module", params=ALL)
def case(request, tmp_path_factory) -> Case:
    return Case(request.param, tmp_path_factory.mktemp(request.param))


def test_logits_match(case):
    with torch.no_grad():
        expected = case.stock(PROMPT).logits
        found = case.ours(PROMPT).logits
    assert (found - expected).norm() <= 1e-5 * expected.norm()
