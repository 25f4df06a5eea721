"""Activations: the families' formulas, in plan files, and by PyTorch."""

from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from activations import exact_glu, with_each_activation
from conftest import demo_shape, make_plan
from transformers.activations import ACT2FN

from fiddler_opt.inputs.machine_parts import KernelLimits
from fiddler_opt.inputs.model import ModelSpec
from fiddler_opt.solve.memory import product_bytes
from fiddler_run.encodings.plain import Fp32
from fiddler_run.errors import FiddlerError
from fiddler_run.kernels.limits import MAX_DECODED_BLOCKS, MAX_TOKEN_BLOCKS
from fiddler_run.kernels.pytorch import apply_blocks, glu, joined_at_once
from fiddler_run.plan.activation import SILU, Activation
from fiddler_run.plan.schema import Plan

CONSTANTS = {"alpha": 1.702, "swiglu_alpha": 1.702, "limit": 0.5, "swiglu_limit": 0.5}
CLAMPED = Activation(function="silu", limit=0.5)
SHIFTED = Activation(function="silu", alpha=1.702, offset=1.0, limit=0.5)


@pytest.mark.parametrize(
    ("module", "experts", "act_fn", "activation"),
    [
        ("mixtral", "MixtralExperts", "silu", SILU),
        ("deepseek_v4", "DeepseekV4Experts", "silu", CLAMPED),
        ("hy_v4", "HYV4Experts", "silu", CLAMPED),
        ("minimax_m3_vl", "MiniMaxM3VLExperts", "silu", SHIFTED),
        ("gpt_oss", "GptOssExperts", "silu", SHIFTED),
        ("gemma4", "Gemma4TextExperts", "gelu_pytorch_tanh", Activation(function="gelu_tanh")),
    ],
)
def test_formulas_are_those_of_transformers(module, experts, act_fn, activation):
    stock = getattr(import_module(f"transformers.models.{module}.modeling_{module}"), experts)
    torch.manual_seed(0)
    gate, up = torch.randn(2, 50, 64)
    gate_up = torch.cat([gate, up], dim=1)
    if module == "gpt_oss":  # gate and up alternate
        gate_up = torch.stack([gate, up], dim=2).flatten(1)
    expected = stock._apply_gate(SimpleNamespace(act_fn=ACT2FN[act_fn], **CONSTANTS), gate_up)
    found_by_kernel = glu(activation, torch.cat([gate, up], dim=1))
    for found in (exact_glu(activation, gate, up), found_by_kernel):
        assert torch.allclose(found, expected, rtol=1e-6, atol=1e-6)


@with_each_activation
def test_pytorch_matches_float64(activation):
    torch.manual_seed(0)
    encoding = Fp32(24, 16)
    blocks = torch.randn(3, encoding.block_bytes // 4).view(torch.uint8)
    states = torch.randn(5, 24)
    expected = torch.zeros(5, 24, dtype=torch.float64)
    for rows, columns in zip(*encoding.decode(blocks), strict=True):
        gate, up = (states.double() @ rows.double().T).chunk(2, dim=1)
        expected += exact_glu(activation, gate, up) @ columns.double().T
    found = apply_blocks(encoding, blocks, states, activation=activation)
    assert (found - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("model", ["mistralai/Mixtral-8x7B-v0.1", "Qwen/Qwen3-30B-A3B"])
@pytest.mark.parametrize("tokens", [1, 64, 300, 512, 700, 1024, 2047, 8192])
def test_joined_products_need_no_more_memory_than_planned(model, tokens):
    model = ModelSpec.load(model).in_encoding("lossless12")
    encoding = model.block_format
    neurons = encoding.block_neurons
    hidden = encoding.hidden_size
    at_once = joined_at_once(encoding, tokens)
    gate_up = 4 * tokens * 2 * neurons * at_once
    activated = (4 + 2) * tokens * neurons * at_once  # in float32, and rounded
    results = 2 * 4 * tokens * hidden  # the result, and the sum
    decoded = MAX_DECODED_BLOCKS * encoding.decoded_bytes
    planned = product_bytes(model, KernelLimits.of_runtime(), tokens)
    assert gate_up + activated + results + decoded <= planned
    assert at_once >= MAX_TOKEN_BLOCKS // tokens


@with_each_activation
def test_plan_lists_an_activation_unless_it_is_silu(activation):
    shape = demo_shape().model_copy(update={"activation": activation})
    plan = make_plan(shape, [[0] * 8] * 6)
    assert Plan.parse(plan.dump(), "here") == plan
    assert ("activation:" in plan.dump()) == (activation != SILU)


def test_model_computes_its_plans_activation(place):
    shape = demo_shape("bfloat16").model_copy(update={"activation": CLAMPED})
    model, _ = place(make_plan(shape, [[1] * 8] * 6, 64))
    assert model.engine.resources.kernels.cpu.activation == CLAMPED


def test_defaults_may_be_left_out():
    text = make_plan(demo_shape(), [[0] * 8] * 6).dump()
    text = text.replace("dtype: float32}", "dtype: float32, activation: {function: gelu_tanh}}")
    assert Plan.parse(text, "here").model.activation == Activation(function="gelu_tanh")


@pytest.mark.parametrize(
    ("activation", "message"),
    [
        ("{}", "model.activation.function: missing"),
        (
            "{function: relu}",
            "model.activation.function: Input should be 'silu', 'gelu_tanh' or 'relu2'",
        ),
        ("{function: silu, beta: 1}", "model.activation.beta: unknown key"),
        ("{function: silu, limit: 0}", "model.activation.limit: Input should be greater than 0"),
        ("{function: silu, limit: .inf}", "model.activation.limit: Input should be a finite"),
        (
            "{function: gelu_tanh, alpha: 1.702}",
            "model.activation.alpha: 1.702, but gelu_tanh has no alpha",
        ),
        ("{function: relu2, limit: 7}", "model.activation.limit: 7, but relu2 has no limit"),
    ],
)
def test_wrong_activation_is_refused(activation, message):
    text = make_plan(demo_shape(), [[0] * 8] * 6).dump()
    text = text.replace("dtype: float32}", f"dtype: float32, activation: {activation}}}")
    with pytest.raises(FiddlerError, match=message):
        Plan.parse(text, "here")
