"""Exactness: with any placement, the model gives the results of stock transformers.

float32: logits within 1e-4 of stock transformers, relative to the largest logit, and the same
greedy tokens.
bfloat16: per layer, on the same input, the relative error against float64 is at most 5e-3 (one
rounding to bfloat16 is up to 3.9e-3). Logits of a whole bfloat16 model are not compared: where
two experts' scores nearly tie, stock transformers' own implementations differ by as much.
"""

import random

import numpy as np
import pytest
import torch
from conftest import DEMO, demo_shape, make_plan, random_plan, with_rank
from models import Stock, move_experts, open_checkpoint
from seeds import seeds, spread

from fiddler_run import load_model
from fiddler_run.encodings.table import ENCODINGS
from fiddler_run.engine.calls import sorted_choices
from fiddler_run.engine.engine import make_engine
from fiddler_run.engine.layer import ExpertsLayer
from fiddler_run.weights.store import ExpertStore

LOGITS_TOLERANCE = 1e-4
BF16_TOLERANCE = 5e-3
NEW_TOKENS = 24
TEXTS = [
    "Once upon a time there was a brave owl named Ruby.",
    "7 * 8 = ",
    "def sum_all(items):\n    total = 0\n",
    "What is 12 plus 30? The answer is",
    "One bright morning",
]
BATCHES = [TEXTS[:1], TEXTS[1:2] * 2, TEXTS[:3], TEXTS[3:4] * 4, TEXTS]  # third and last: padded


def assert_same(model, stock: Stock, encoded, new_tokens: int = NEW_TOKENS) -> None:
    ids = encoded["input_ids"]
    mask = encoded["attention_mask"]
    expected = stock.logits(ids, mask)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits
    seen = mask.bool()
    worst = (logits - expected)[seen].abs().max() / expected[seen].abs().max()
    assert worst <= LOGITS_TOLERANCE
    tokens = model.generate(ids, attention_mask=mask, **greedy(new_tokens))
    of_stock = stock.generate(ids, mask, **greedy(max(new_tokens, NEW_TOKENS)))
    assert torch.equal(tokens, of_stock[:, : tokens.shape[1]])


def greedy(new_tokens: int) -> dict:
    return {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}


def encode(tokenizer, texts: list[str], device: torch.device):
    return tokenizer(texts, return_tensors="pt", padding=True).to(device)


@pytest.mark.parametrize("seed", seeds(2, 12))
def test_random_placements_match_stock(seed, place, stock, device):
    """Batches of 1 to 5 sequences, left-padded or of one length; experts of 8, 4 or 2 blocks."""
    block_neurons = (32, 128, 64)[seed % 3]
    model, tokenizer = place(random_plan(demo_shape(), random.Random(seed), block_neurons))
    texts = BATCHES[seed % 5]
    encoded = encode(tokenizer, texts, device)
    assert bool((encoded["attention_mask"] == 0).any()) == (len(set(texts)) > 1)
    assert_same(model, stock, encoded, 64 if seed == 3 else NEW_TOKENS)


@pytest.mark.parametrize("kind", ["resident", "streamed", "cpu"])
def test_one_kind_of_blocks_alone_matches_stock(kind, place, stock, device):
    resident = [[4 if kind == "resident" else 0] * 8] * 6
    share = {1: float(kind == "streamed")}
    model, tokenizer = place(make_plan(demo_shape(), resident, 64, share))
    assert_same(model, stock, encode(tokenizer, TEXTS[2:3], device))
    hit_rate = model.engine.resources.traffic.hit_rate
    assert hit_rate == (1.0 if kind == "resident" else 0.0)


@pytest.mark.parametrize("seed", seeds(1, 2))
def test_placement_without_streaming_matches_stock(seed, place, stock, device):
    """Without a GPU, all blocks are then computed in one CPU job."""
    plan = random_plan(demo_shape(), random.Random(100 + seed), block_neurons=64)
    memory = plan.rank.gpu_memory_bytes.model_copy(update={"staging": 0})
    model, tokenizer = place(with_rank(plan, gpu_memory_bytes=memory, stream_share={1: 0.0}))
    assert model.engine.resources.ring is None
    assert_same(model, stock, encode(tokenizer, TEXTS, device))
    assert 0 < model.engine.resources.traffic.hit_rate < 1


@pytest.mark.parametrize(
    "overrides",
    spread(
        [
            {"num_local_experts": 4},
            {"num_local_experts": 4, "num_experts_per_tok": 1},
            {"num_local_experts": 4, "num_experts_per_tok": 3},
            {"intermediate_size": 100},
            {"intermediate_size": 20},
            {"tie_word_embeddings": True},
            {"num_hidden_layers": 1},
            {"head_dim": 16},
            {
                "num_local_experts": 4,
                "intermediate_size": 75,
                "tie_word_embeddings": True,
                "num_hidden_layers": 1,
            },
        ],
        3,
    ),
    ids=str,
)
def test_odd_shapes_match_stock(overrides, random_checkpoint, device):
    folder, shape = random_checkpoint(**overrides)
    stock = Stock(folder, device)
    ids = torch.randint(3, 97, (3, 11), generator=torch.Generator().manual_seed(1)).to(device)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    plans = [random_plan(shape, random.Random(seed)) for seed in range(3)]
    model, _ = load_model(plans[0], folder)
    for plan in plans:
        move_experts(model, plan, folder)
        assert_same(model, stock, {"input_ids": ids, "attention_mask": mask}, 8)


def exact_layer(states, index, weights, experts):
    """One layer's experts in float64."""
    output = torch.zeros(states.shape, dtype=torch.float64)
    for expert, matrices in enumerate(experts):
        gate, up, down = (matrix.double() for matrix in matrices)
        tokens, choices = torch.where(index == expert)
        x = states[tokens].double()
        hidden = torch.nn.functional.silu(x @ gate.T) * (x @ up.T)
        output[tokens] += weights[tokens, choices].double().unsqueeze(1) * (hidden @ down.T)
    return output


@pytest.mark.parametrize("encoding", ["bf16", "lossless12"])
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_bfloat16_layer_matches_float64(tokens, encoding, device):
    if not ENCODINGS[encoding].available():
        pytest.skip("needs a C++ compiler")
    rng = random.Random(tokens)
    plan = random_plan(demo_shape("bfloat16"), rng, 64, encoding=encoding)
    rank = plan.rank
    checkpoint = open_checkpoint(DEMO)
    store = ExpertStore(plan, device, DEMO)
    store.load(checkpoint)
    engine = make_engine(plan.block_format, device, rank.cpu_threads, 3, rank.cpu_pinned)
    torch.manual_seed(tokens)
    for number in range(6):
        states = torch.randn(tokens, 128).bfloat16()
        index = torch.stack([torch.randperm(8)[:2] for _ in range(tokens)])
        weights = torch.rand(tokens, 2).softmax(dim=1)
        experts = [checkpoint.expert(number, expert) for expert in range(8)]
        expected = exact_layer(states, index, weights, experts)
        for _ in range(4):  # stream shares from none to all host blocks
            share = rng.choice([0.0, rng.random(), 1.0])
            places = store.resident[number], store.host[number]
            layer = ExpertsLayer(
                number, *places, lambda _, s=share: s, engine, store.on_disk[number]
            )
            output = layer(states.to(device), index.to(device), weights.to(device))
            assert output.dtype == torch.bfloat16
            error = (output.double().cpu() - expected).norm() / expected.norm()
            assert error <= BF16_TOLERANCE


def test_embedding_in_host_memory_matches_stock(stock, device, tmp_path):
    """Also with disk blocks, whose file has no name in the folder."""
    plan = make_plan(demo_shape(), [[2] * 8] * 6, on_disk=[[1, 0, 6, 2, 3, 0, 0, 4]] * 6)
    in_host = plan.rank.host_memory_bytes.model_copy(update={"embedding": 1})
    plan = with_rank(plan, host_memory_bytes=in_host)
    model, tokenizer = load_model(plan, DEMO, disk_folder=tmp_path)
    assert not any(tmp_path.iterdir())
    assert not any("embed_tokens" in name for name, _ in model.named_parameters())
    assert model.device.type == device.type
    assert_same(model, stock, encode(tokenizer, TEXTS, device), 12)


def test_same_input_gives_same_bits(place, device):
    model, tokenizer = place(random_plan(demo_shape("bfloat16"), random.Random(9)))
    encoded = encode(tokenizer, TEXTS, device)
    with torch.no_grad():
        first = model(**encoded).logits
        second = model(**encoded).logits
    assert torch.equal(first, second)


def test_every_choice_is_grouped_once():
    index = np.array([[2, 0], [0, 3], [2, 3]])
    weights = np.array([[0.6, 0.4], [0.7, 0.3], [0.9, 0.1]])
    choices = sorted_choices(index, weights, 5)
    assert choices.experts.tolist() == [0, 2, 3]
    assert choices.starts.tolist() == [0, 2, 4, 6]
    assert choices.tokens.tolist() == [2, 2, 2]
    assert choices.numbers.tolist() == [1, 2, 0, 4, 3, 5]
    assert choices.rows.tolist() == [0, 1, 0, 2, 1, 2]
    assert choices.weights.tolist() == [0.4, 0.7, 0.6, 0.9, 0.3, 0.1]


def test_choices_of_unknown_experts_are_left_out():
    index = np.array([[2, -1], [5, 2], [5, 9]])
    choices = sorted_choices(index, np.ones((3, 2), dtype=np.float32), 5)
    assert choices.experts.tolist() == [2]
    assert choices.numbers.tolist() == [0, 3]
    nothing = sorted_choices(index[2:], np.ones((1, 2), dtype=np.float32), 5)
    assert len(nothing.experts) == len(nothing.numbers) == 0
    assert nothing.starts.tolist() == [0]
