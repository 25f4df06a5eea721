"""Encodings: blocks lose nothing, and a new encoding is one class and one line."""

import random

import pytest
import torch
from conftest import DEMO, demo_shape, make_plan, random_plan
from torch.nn.functional import silu

from fiddler_run import load_model
from fiddler_run.encodings.plain import Bf16, Fp32
from fiddler_run.encodings.table import ENCODINGS
from fiddler_run.errors import FiddlerError
from fiddler_run.kernels import table as kernels
from fiddler_run.kernels.pytorch import apply_blocks
from fiddler_run.plan.schema import Plan

HIDDEN = 24
SIZES = {"lossless12": (128, 64)}  # hidden size and neurons of a block, if not (HIDDEN, 16)


def expert(intermediate: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(intermediate)
    return (
        torch.randn(intermediate, HIDDEN),
        torch.randn(intermediate, HIDDEN),
        torch.randn(HIDDEN, intermediate),
    )


def empty_blocks(encoding: Fp32, count: int) -> torch.Tensor:
    return torch.full((count, encoding.block_bytes), 255, dtype=torch.uint8)


def reference(
    x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    x, gate, up, down = (tensor.double() for tensor in (x, gate, up, down))
    return (silu(x @ gate.T) * (x @ up.T)) @ down.T


@pytest.mark.parametrize(
    ("intermediate", "neurons"), [(64, 16), (64, 64), (100, 32), (5, 32), (33, 32)]
)
def test_any_split_gives_the_same_expert(intermediate, neurons):
    encoding = Fp32(HIDDEN, neurons)
    weights = expert(intermediate)
    count = encoding.blocks_per_expert(intermediate)
    x = torch.randn(7, HIDDEN)
    expected = reference(x, *weights)
    for cut in range(count + 1):
        first = empty_blocks(encoding, cut)
        second = empty_blocks(encoding, count - cut)
        encoding.encode(first, *weights, 0)
        encoding.encode(second, *weights, cut * neurons)
        total = apply_blocks(encoding, first, x) + apply_blocks(encoding, second, x)
        assert torch.allclose(total.double(), expected, rtol=1e-4, atol=1e-4)


def test_block_holds_gate_up_and_down():
    encoding = Fp32(HIDDEN, 2)
    gate, up, down = expert(4)
    blocks = empty_blocks(encoding, 2)
    encoding.encode(blocks, gate, up, down, 0)
    expected = torch.cat([gate[2:4].flatten(), up[2:4].flatten(), down[:, 2:4].flatten()])
    assert torch.equal(blocks[1].view(torch.float32), expected)


class ReversedBf16(Bf16):
    """bf16 with the bytes of each weight swapped, which no kernel can read."""

    name = "reversed-bf16"

    def encode(self, blocks, gate, up, down, first_neuron):
        referred = super().encode(blocks, gate, up, down, first_neuron)
        blocks.copy_(swapped(blocks))
        return referred

    def decode(self, blocks):
        return super().decode(swapped(blocks))


def swapped(blocks: torch.Tensor) -> torch.Tensor:
    return blocks.unflatten(1, (-1, 2)).flip(2).flatten(1)


@pytest.mark.parametrize("name", [*ENCODINGS, ReversedBf16.name])
def test_decode_returns_the_encoded_bits(name, monkeypatch):
    monkeypatch.setitem(ENCODINGS, ReversedBf16.name, ReversedBf16)
    if not {**ENCODINGS, ReversedBf16.name: ReversedBf16}[name].available():
        pytest.skip("needs a C++ compiler")
    hidden, neurons = SIZES.get(name, (HIDDEN, 16))
    encoding = ENCODINGS[name](hidden, neurons)
    dtype = getattr(torch, encoding.dtype)
    size = torch.empty(0, dtype=dtype).itemsize
    generator = torch.Generator().manual_seed(0)

    def bits(*shape: int) -> torch.Tensor:
        random_bytes = (*shape[:-1], shape[-1] * size)
        drawn = torch.randint(0, 256, random_bytes, dtype=torch.uint8, generator=generator)
        return drawn.view(dtype)

    gate, up, down = bits(4 * neurons, hidden), bits(4 * neurons, hidden), bits(hidden, 4 * neurons)
    blocks = empty_blocks(encoding, 4)
    referred = encoding.encode(blocks, gate, up, down, 0)
    assert len(referred) == (4 if name == "lossless12" else 0)  # random bits: many escapes
    gate_up, columns = encoding.decode(blocks)
    found = (
        gate_up[:, :neurons].flatten(0, 1),
        gate_up[:, neurons:].flatten(0, 1),
        columns.transpose(0, 1).flatten(1),
    )
    for got, want in zip(found, (gate, up, down), strict=True):
        assert torch.equal(got.contiguous().view(torch.uint8), want.view(torch.uint8))


def test_model_runs_in_a_new_encoding(monkeypatch, tmp_path, device):
    """The class and its line serve the plan file, loading, prefill and decode."""
    plan = random_plan(demo_shape("bfloat16"), random.Random(1))
    monkeypatch.setattr(kernels, "CPU", {})  # leaves PyTorch, which computes every encoding
    monkeypatch.setattr(kernels, "GPU", {})

    def logits(plan: Plan) -> torch.Tensor:
        model, tokenizer = load_model(plan, DEMO)
        inputs = tokenizer("Once upon a time there was", return_tensors="pt").to(device)
        output = model.generate(
            **inputs,
            max_new_tokens=12,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        return torch.stack(output.logits)

    expected = logits(plan)
    monkeypatch.setitem(ENCODINGS, ReversedBf16.name, ReversedBf16)
    plan.model_copy(update={"encoding": ReversedBf16.name}).save(tmp_path / "plan.yaml")
    assert torch.equal(logits(Plan.load(tmp_path / "plan.yaml")), expected)


@pytest.mark.parametrize(
    ("encoding", "message"),
    [
        ("int3", "encoding: int3 is unknown; known are bf16, fp16, fp32, lossless12"),
        ("bf16", "encoding: bf16 stores bfloat16, the model is float32"),
        ("lossless12", "block_neurons: 32 is not a multiple of 64, which lossless12 needs"),
    ],
)
def test_impossible_encoding_is_refused(encoding, message):
    plan = make_plan(demo_shape(), [[0] * 8] * 6)
    text = plan.model_copy(update={"encoding": encoding}).dump()
    _, problems = Plan.examine(text, "plan")
    assert f"plan: {message}" in problems
    with pytest.raises(FiddlerError):
        Plan.parse(text, "plan")
