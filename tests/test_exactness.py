"""The promise: whatever the placement, the model is the reference's.

float32: logits within 1e-4 of stock transformers, relative to the largest logit, and the same 64 greedy tokens.
bfloat16: per layer, on the same input, the relative error against float64 is at most 5e-3 (one rounding to bfloat16 is up to
3.9e-3). Logits of a whole bfloat16 model are no fit measure: where two experts' scores nearly tie, stock transformers differs
from itself by as much between its own implementations.
"""

import random

import numpy as np
import pytest
import torch
from conftest import DEMO, demo_shape, make_plan, random_plan
from transformers import MixtralForCausalLM

from fiddler_run import load_model
from fiddler_run.arena import ExpertStore
from fiddler_run.checkpoint import Checkpoint
from fiddler_run.dispatch import LayerDispatch, expert_groups
from fiddler_run.model import make_executors

LOGITS_TOLERANCE, BF16_TOLERANCE = 1e-4, 5e-3
TEXTS = [
    "Once upon a time there was a brave owl named Ruby.",
    "7 * 8 = ",
    "def sum_all(items):\n    total = 0\n",
    "What is 12 plus 30? The answer is",
    "One bright morning",
]


class Reference:
    """Stock transformers on the same device; what it gave for an input is kept.

    Its eager experts, because its default ones refuse sizes that are no multiple of 16 bytes.
    """

    def __init__(self, folder, device):
        model = MixtralForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager")
        self.model = model.to(device).eval()
        self._kept = {}

    @torch.no_grad()
    def __call__(self, key, ids, mask, new_tokens):
        if key not in self._kept:
            logits = self.model(ids, attention_mask=mask).logits
            tokens = self.model.generate(
                ids, attention_mask=mask, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False
            )
            self._kept[key] = logits, tokens
        return self._kept[key]


def assert_same(model, reference, key, ids, mask, new_tokens):
    expected_logits, expected_tokens = reference(key, ids, mask, new_tokens)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits
    seen = mask.bool()
    worst = (logits - expected_logits)[seen].abs().max() / expected_logits[seen].abs().max()
    assert worst <= LOGITS_TOLERANCE
    tokens = model.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False)
    assert torch.equal(tokens, expected_tokens)


@pytest.fixture(scope="module")
def reference(device):
    return Reference(DEMO, device)


@pytest.mark.parametrize("seed", range(30))
def test_random_placements(seed, reference, device):
    """30 placements of the demo model; batches of 1 to 5, padded on the left or all of one length."""
    rng = random.Random(seed)
    model, tokenizer = load_model(random_plan(demo_shape(), rng), DEMO)
    batch, padded = seed % 5 + 1, seed % 2 == 1 and seed % 5 > 0
    texts = TEXTS[:batch] if padded else [TEXTS[seed % 5]] * batch
    encoded = tokenizer(texts, return_tensors="pt", padding=True).to(device)
    assert bool((encoded["attention_mask"] == 0).any()) == padded
    assert_same(model, reference, (batch, padded, seed % 5), encoded["input_ids"], encoded["attention_mask"], 64)


@pytest.mark.parametrize("executor", ["resident", "streamed", "cpu"])
def test_one_executor_alone(executor, reference, device):
    plan = make_plan(demo_shape(), [[8 if executor == "resident" else 0] * 8] * 6, share={1: float(executor == "streamed")})
    model, tokenizer = load_model(plan, DEMO)
    encoded = tokenizer(TEXTS[2], return_tensors="pt").to(device)
    assert_same(model, reference, executor, encoded["input_ids"], encoded["attention_mask"], 64)
    assert model.executors.traffic.hit_rate == (1.0 if executor == "resident" else 0.0)


@pytest.mark.parametrize("seed", range(4))
def test_where_nothing_is_streamed(seed, reference, device):
    """Then a machine without a GPU computes all blocks, wherever they lie, in one job."""
    plan = random_plan(demo_shape(), random.Random(100 + seed))
    memory = plan.gpu_memory_bytes.model_copy(update={"staging": 0})
    plan = plan.model_copy(update={"gpu_memory_bytes": memory, "stream_share": {1: 0.0}})
    model, tokenizer = load_model(plan, DEMO)
    assert model.executors.ring is None
    encoded = tokenizer(TEXTS, return_tensors="pt", padding=True).to(device)
    assert_same(model, reference, "unstreamed", encoded["input_ids"], encoded["attention_mask"], 32)
    assert 0 < model.executors.traffic.hit_rate < 1


@pytest.mark.parametrize(
    "overrides",
    [
        {"num_local_experts": 4},
        {"num_local_experts": 4, "num_experts_per_tok": 1},
        {"num_local_experts": 4, "num_experts_per_tok": 3},
        {"intermediate_size": 100},
        {"intermediate_size": 20},
        {"tie_word_embeddings": True},
        {"num_hidden_layers": 1},
        {"head_dim": 16},
        {"num_local_experts": 4, "intermediate_size": 75, "tie_word_embeddings": True, "num_hidden_layers": 1},
    ],
    ids=str,
)
def test_odd_shapes(overrides, random_checkpoint, device):
    folder, shape = random_checkpoint(**overrides)
    reference = Reference(folder, device)
    ids = torch.randint(3, 97, (3, 11), generator=torch.Generator().manual_seed(1)).to(device)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    for seed in range(3):
        model, _ = load_model(random_plan(shape, random.Random(seed)), folder)
        assert_same(model, reference, "same", ids, mask, 32)


def exact_layer(states, index, weights, experts):
    """One layer's experts in float64."""
    output = torch.zeros(states.shape, dtype=torch.float64)
    for token in range(len(states)):
        for expert, weight in zip(index[token].tolist(), weights[token].tolist(), strict=True):
            gate, up, down = (tensor.double() for tensor in experts[expert])
            x = states[token].double()
            output[token] += weight * ((torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T)
    return output


@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_bfloat16_layer_against_float64(tokens, device):
    rng = random.Random(tokens)
    plan = random_plan(demo_shape("bfloat16"), rng)
    checkpoint, store = Checkpoint.of_experts(DEMO, plan.model), ExpertStore(plan, device, DEMO)
    store.load(checkpoint)
    executors = make_executors(plan, device)
    torch.manual_seed(tokens)
    for layer in range(6):
        states = torch.randn(tokens, 128).bfloat16()
        index = torch.stack([torch.randperm(8)[:2] for _ in range(tokens)])
        weights = torch.rand(tokens, 2).softmax(dim=1)
        experts = [[matrix.clone() for matrix in checkpoint.expert(layer, e)] for e in range(8)]
        expected = exact_layer(states, index, weights, experts)
        for _ in range(4):  # shares of none to all of the absent blocks
            share = rng.choice([0.0, rng.random(), 1.0])
            places = store.resident[layer], store.absent[layer]
            dispatch = LayerDispatch(layer, *places, lambda _, s=share: s, executors, store.on_disk[layer])
            output = dispatch(states.to(device), index.to(device), weights.to(device))
            assert output.dtype == torch.bfloat16
            error = (output.double().cpu() - expected).norm() / expected.norm()
            assert error <= BF16_TOLERANCE


def test_embedding_in_host_memory(device, tmp_path):
    """With any tokens and shapes; and some experts on another disk, of which nothing is left to see."""
    shape = demo_shape()
    plan = make_plan(shape, [[2] * 8] * 6, on_disk=[[1, 0, 6, 2, 3, 0, 0, 4]] * 6)
    in_host = plan.host_memory_bytes.model_copy(update={"embedding": 1})
    model, tokenizer = load_model(plan.model_copy(update={"host_memory_bytes": in_host}), DEMO, disk_folder=tmp_path)
    assert not any(tmp_path.iterdir())
    assert not any("embed_tokens" in name for name, _ in model.named_parameters())
    assert model.device.type == device.type
    encoded = tokenizer(TEXTS, return_tensors="pt", padding=True).to(device)
    assert_same(model, Reference(DEMO, device), "texts", encoded["input_ids"], encoded["attention_mask"], 16)


def test_the_same_input_gives_the_same_bits(device):
    model, tokenizer = load_model(random_plan(demo_shape("bfloat16"), random.Random(9)), DEMO)
    encoded = tokenizer(TEXTS, return_tensors="pt", padding=True).to(device)
    with torch.no_grad():
        first, second = (model(**encoded).logits for _ in range(2))
    assert torch.equal(first, second)


def test_every_choice_is_grouped_once():
    index = np.array([[2, 0], [0, 3], [2, 3]])
    weights = np.array([[0.6, 0.4], [0.7, 0.3], [0.9, 0.1]])
    groups = expert_groups(index, weights, 5)
    calls = {expert: (rows.tolist(), chosen.tolist()) for expert, rows, chosen in groups}
    assert calls == {0: ([0, 1], [0.4, 0.7]), 2: ([0, 2], [0.6, 0.9]), 3: ([1, 2], [0.3, 0.1])}
