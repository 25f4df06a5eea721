"""Every family that transformers dispatches: the same answers as the stock model."""

import copy
import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from captures import record_on_any_device
from conftest import DEMO, make_plan
from families import FAMILIES, stock_model, tiny_config
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from fiddler_run import load_model
from fiddler_run.encodings.lossless12 import Lossless12
from fiddler_run.errors import FiddlerError
from fiddler_run.generation.generate import generate_ids, never_stopping
from fiddler_run.generation.prefill import FORGET_BETWEEN_CHUNKS, forgets_between_chunks
from fiddler_run.generation.sampling import Options
from fiddler_run.models.config import ModelConfig
from fiddler_run.models.experts import experts_modules
from fiddler_run.models.measured import described
from fiddler_run.plan.schema import Plan

# run by default: of each kind of attention, cache and checkpoint at least one
COMMON = (
    "deepseek_v2",
    "glm4_moe_lite",
    "lfm2_moe",
    "mimo_v2_flash",
    "mixtral",
    "qwen3_5_moe_text",
    "qwen3_moe",
    "qwen3_next",
)
# a cache of its own; a router that reads the tokens' numbers
WITHOUT_TAPES = ("minimax", "deepseek_v4")
PROMPT = torch.tensor([[3, 17, 42, 5, 88, 23, 9, 31, 77, 12]])
PADDED = {
    "input_ids": torch.tensor([[0, 0, 0, 42, 5, 88], [7, 3, 17, 42, 11, 2]]),
    "attention_mask": torch.tensor([[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]]),
}
GREEDY = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0, "eos_token_id": 767}
ENCODINGS_OF_BFLOAT16 = ["bf16", *(["lossless12"] if Lossless12.available() else [])]
# of each kind of cache one
FEW = ("deepseek_v2", "mimo_v2_flash", "qwen3_next")
CACHES = ("deepseek_v2", "lfm2_moe", "mimo_v2_flash", "mixtral", "qwen3_next")


def families(usual: tuple[str, ...]) -> list:
    """All families; only the usual ones are run by default."""
    return [
        pytest.param(name, marks=() if name in usual else pytest.mark.slow) for name in FAMILIES
    ]


class Case:
    """A family's stock model, and the same checkpoint run by a random plan."""

    def __init__(self, model_type: str, folder: Path):
        self.config = tiny_config(model_type)
        self.stock = stock_model(self.config)
        save(self.stock, folder)
        skip_if_not_dispatched(self.stock)
        self.ours, _ = load_model(random_plan(folder, model_type), folder)
        self.stock.to(self.ours.device)
        self._uses_tapes: bool | None = None

    @property
    def can_use_tapes(self) -> bool:
        """False for a cache of the family's own, and for one that grows an index of its keys."""
        indexed = any(hasattr(layer, "update_indexer") for layer in self.ours.cache.layers)
        return not indexed and self.config.model_type not in WITHOUT_TAPES

    def use_tapes(self, wanted: bool) -> None:
        """Lets decode steps run from tapes, or by the stock forward pass."""
        if wanted == self._uses_tapes:
            return
        self._uses_tapes = wanted
        session = self.ours.session
        session.make_capture = None
        session.forget_decode()
        if wanted:
            record_on_any_device(self.ours)
        else:
            session.decode._make_capture = None

    def generations(self, **arguments: object) -> list[torch.Tensor | type]:
        """Both models' greedy tokens, or the type of what they raise."""
        found = []
        for model in (self.stock, self.ours):
            try:
                found.append(model.generate(**moved(arguments, model), **GREEDY).cpu())
            except Exception as error:  # both must refuse alike
                found.append(type(error))
        return found


def skip_if_not_dispatched(model: PreTrainedModel) -> None:
    if not experts_modules(model):
        pytest.skip("this version of transformers does not dispatch its experts")


def moved(arguments: dict, model: PreTrainedModel) -> dict:
    """The arguments, with tensors on the model's device."""
    return {
        name: value.to(model.device) if isinstance(value, torch.Tensor) else value
        for name, value in arguments.items()
    }


def save(model: PreTrainedModel, folder: Path) -> None:
    model.save_pretrained(folder)
    for file in DEMO.glob("tokenizer*"):
        shutil.copy(file, folder)


def random_plan(
    folder: Path, seed: str, dtype: str = "float32", encoding: str | None = None
) -> Plan:
    config = ModelConfig.read(folder / "config.json")
    _, shape, _ = described(config, str(folder), dtype)
    neurons = 64 if encoding == "lossless12" else 32
    blocks = -(-shape.intermediate_size // neurons)
    drawn = random.Random(seed)
    resident = [
        [drawn.randint(0, blocks) for _ in range(shape.num_experts)]
        for _ in range(shape.num_layers)
    ]
    share = {1: drawn.random()}
    return make_plan(shape, resident, neurons, share, encoding=encoding)


@pytest.fixture(scope="module", params=families(COMMON))
def case(request, tmp_path_factory) -> Case:
    return Case(request.param, tmp_path_factory.mktemp(request.param))


@torch.no_grad()
def test_logits_match(case):
    for inputs, valid in (({"input_ids": PROMPT}, ...), (PADDED, PADDED["attention_mask"].bool())):
        expected, found = (
            model(**moved(inputs, model)).logits.cpu()[valid] for model in (case.stock, case.ours)
        )
        assert (found - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("case", families(FEW), indirect=True)
def test_tokens_match(case):
    """Twice, because states are reset; with beams, padding and chunks, or both refuse them."""
    greedy = {"input_ids": PROMPT}
    runs = [
        (greedy, False),
        (greedy, True),
        ({"input_ids": PROMPT[:, :7]}, True),
        ({"input_ids": PROMPT, "num_beams": 3, "num_return_sequences": 2}, True),
        (PADDED, True),
        ({"input_ids": PROMPT, "prefill_chunk_size": 4}, True),
    ]
    for inputs, tapes in runs:
        if "prefill_chunk_size" in inputs and forgets_between_chunks(case.ours):
            with pytest.raises(FiddlerError, match="cannot continue; shorten it"):
                case.ours.generate(**inputs, **GREEDY)
            continue
        case.use_tapes(tapes)
        stock, ours = case.generations(**inputs)
        assert type(stock) is type(ours), (stock, ours)
        if isinstance(stock, torch.Tensor):
            assert torch.equal(stock, ours)
            used = case.ours.session.decode._tapes
            assert bool(used) == (tapes and case.can_use_tapes)


@pytest.mark.parametrize("whole", ["qwen3_5_moe", "gemma4"])
@torch.no_grad()
def test_language_part_of_a_larger_checkpoint_runs(whole, tmp_path):
    stock = stock_model(tiny_config(f"{whole}_text"))
    save(stock, tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {
        name.replace("model.", "model.language_model.", 1): tensor
        for name, tensor in load_file(file).items()
    }
    tensors["model.visual.patch_embed.weight"] = torch.zeros(3)
    save_file(tensors, file, {"format": "pt"})
    config = tmp_path / "config.json"
    text = json.loads(config.read_text())
    config.write_text(json.dumps({"model_type": whole, "text_config": text, "dtype": "float32"}))
    ours, _ = load_model(random_plan(tmp_path, whole), tmp_path)
    expected = stock(PROMPT).logits
    assert (ours(PROMPT).logits - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("encoding", ENCODINGS_OF_BFLOAT16)
@pytest.mark.parametrize(
    "model_type",
    [pytest.param(name, marks=() if name in CACHES else pytest.mark.slow) for name in COMMON],
)
@torch.no_grad()
def test_experts_in_bfloat16_are_as_exact_as_stock(model_type, encoding, tmp_path):
    stock = stock_model(tiny_config(model_type)).bfloat16()
    skip_if_not_dispatched(stock)
    save(stock, tmp_path)
    ours, _ = load_model(random_plan(tmp_path, model_type, "bfloat16", encoding), tmp_path)
    states = torch.randn(40, 64).bfloat16()
    weights, index = torch.rand(40, 8).topk(2)
    for one, other in zip(experts_modules(stock).values(), ours.experts_modules(), strict=True):
        exact = copy.deepcopy(one).float()(states.float(), index, weights)
        error = (one(states, index, weights.bfloat16()) - exact).norm()
        found = other.planned(*(each.to(ours.device) for each in (states, index, weights)))
        assert (found.cpu() - exact).norm() <= error


def continued(case: Case, tail: list[int], fresh: bool) -> tuple[list[int], list[int]]:
    """All tokens of three turns, and how many each reused. `fresh`: none."""
    session = case.ours.session
    session.cache.tokens = []
    ids = PROMPT[0].tolist()
    reused = []
    for more in ([], tail, [44]):
        ids = [*ids, *more]
        with session.prefix_kept(ids) as prefix:
            output, _ = generate_ids(
                case.ours,
                torch.tensor([ids]),
                Options(6),
                **never_stopping(case.ours),
                **prefix.arguments,
            )
            ids = output[0].tolist()
            prefix.keep([] if fresh else ids)
            reused.append(prefix.tokens)
    return ids, reused


@pytest.mark.parametrize("case", families(FEW), indirect=True)
def test_reused_prefix_gives_the_same_tokens(case):
    for tail in ([5, 6, 7, 8, 9, 10], [91]):
        expected, none = continued(case, tail, fresh=True)
        found, reused = continued(case, tail, fresh=False)
        assert found == expected
        assert none == [0, 0, 0]
        reuses = case.config.model_type not in (*WITHOUT_TAPES, *FORGET_BETWEEN_CHUNKS)
        assert not reuses or reused == [0, 15, 21 + len(tail)]
