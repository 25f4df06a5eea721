"""Parts of a model replaced after a generation: prefill and decode use the new ones."""

import random

import pytest
import torch
from captures import record_on_any_device
from conftest import DEMO, demo_shape, random_plan, with_rank
from seeds import spread
from transformers.models.mixtral import modeling_mixtral as mixtral

from fiddler_run import load_model
from fiddler_run.errors import FiddlerError

TEXT = "Once upon a time there was a kind bear"


def rolled(linear: torch.nn.Linear) -> torch.nn.Linear:
    """A new module whose weight rows are rolled."""
    weight = linear.weight
    where = {"dtype": weight.dtype, "device": weight.device}
    other = torch.nn.Linear(linear.in_features, linear.out_features, bias=False, **where)
    other.weight = torch.nn.Parameter(weight.roll(5, dims=0), requires_grad=False)
    return other


class Wrapped(torch.nn.Module):
    """Wraps a module, as adapters do."""

    def __init__(self, base: torch.nn.Module):
        super().__init__()
        self.base = base

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.base(states).roll(1, dims=-1)


class OtherLayer(mixtral.MixtralDecoderLayer):
    """A layer that does more than the stock one."""

    def forward(self, hidden_states, **named):
        return super().forward(hidden_states, **named) * 0.5


def other_parameter(model) -> None:
    for layer in model.model.layers:
        projection = layer.self_attn.o_proj
        rolled_weight = projection.weight.roll(7, dims=0)
        projection.weight = torch.nn.Parameter(rolled_weight, requires_grad=False)


def other_data(model) -> None:
    generator = torch.Generator().manual_seed(1)
    factors = torch.randn(128, generator=generator).to(model.device)
    for layer in model.model.layers:
        norm = layer.post_attention_layernorm
        norm.weight.data = norm.weight.data * factors


def other_router(model) -> None:
    for layer in model.model.layers:
        router = layer.mlp.gate
        router.weight = torch.nn.Parameter(router.weight.flip(0).clone(), requires_grad=False)


def other_class(model) -> None:
    layer = model.model.layers[4]
    layer.__class__ = OtherLayer


def other_head(model) -> None:
    model.set_output_embeddings(rolled(model.get_output_embeddings()))


def other_projection(model) -> None:
    attention = model.model.layers[0].self_attn
    attention.o_proj = rolled(attention.o_proj)


def wrapped_projection(model) -> None:
    attention = model.model.layers[0].self_attn
    attention.q_proj = Wrapped(attention.q_proj)


REPLACEMENTS = {
    "head": other_head,
    "wrapped head": lambda model: setattr(model, "lm_head", Wrapped(model.lm_head)),
    "o_proj": other_projection,
    "wrapped q_proj": wrapped_projection,
    "a parameter": other_parameter,
    "a parameter's data": other_data,
    "router": other_router,
    "layer of another class": other_class,
    "fewer layers": lambda model: setattr(model.model, "layers", model.model.layers[:4]),
    "more rows of the embedding": lambda m: m.resize_token_embeddings(800, mean_resizing=False),
    "final norm": lambda model: setattr(model.model, "norm", Wrapped(model.model.norm)),
}


@pytest.mark.parametrize("replacement", spread(REPLACEMENTS, 2))
def test_replaced_part_is_used(replacement, device):
    """The tokens match those of transformers' own forward pass."""
    plan = random_plan(demo_shape(), random.Random(3), block_neurons=128)
    model, tokenizer = load_model(plan, DEMO)
    record_on_any_device(model)
    encoded = tokenizer(TEXT, return_tensors="pt").to(device)
    arguments = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    before = model.generate(**encoded, **arguments)
    REPLACEMENTS[replacement](model)
    after = model.generate(**encoded, **arguments)
    # With a hook on a layer, transformers' own forward pass is used.
    with model.model.layers[0].register_forward_hook(lambda *_: None):
        expected = model.generate(**encoded, **arguments)
    assert torch.equal(after, expected)
    assert replacement == "more rows of the embedding" or not torch.equal(after, before)


def test_embedding_in_host_memory_cannot_be_resized():
    plan = random_plan(demo_shape(), random.Random(3))
    in_host = plan.rank.host_memory_bytes.model_copy(update={"embedding": 1})
    model, _ = load_model(with_rank(plan, host_memory_bytes=in_host), DEMO)
    with pytest.raises(FiddlerError, match="the plan keeps the embedding in host memory"):
        model.resize_token_embeddings(800)
