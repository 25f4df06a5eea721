"""A Mixtral decoder layer, split into segments of transformers' own modules."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn
from transformers.models.mixtral import modeling_mixtral as mixtral


class Segments(NamedTuple):
    """One decoder layer in a decode step: `before`, attention, `after`, `experts`, in this order.

    `before(cos, sin, *parts)` takes the rotary embedding and the addends of the residual stream. It
    returns the residual [sequences, 1, hidden], and query, key and value [sequences, heads, 1,
    head_dim]. `eager_attention` is the family's plain attention function, and `attention` the
    module that it takes as an argument. `after(residual, attended)`, with `attended` [sequences, 1,
    heads, head_dim], returns the residual, the experts' input [tokens, hidden], and the router's
    choice and weights [tokens, k]. `experts` is the module that computes them.
    """

    before: Callable
    attention: nn.Module
    eager_attention: Callable
    after: Callable
    experts: nn.Module


def sum_parts(parts: tuple[Tensor, ...]) -> Tensor:
    """The sum of the parts, in the shape of the first."""
    total, *others = parts
    for part in others:
        total = total + part.view_as(total)
    return total


class Before:
    """The part before a layer's attention, see `Segments`."""

    def __init__(self, layer: mixtral.MixtralDecoderLayer):
        self._norm = layer.input_layernorm
        self._attention = layer.self_attn

    def __call__(self, cos: Tensor, sin: Tensor, *parts: Tensor) -> tuple[Tensor, ...]:
        attention = self._attention
        residual = sum_parts(parts)
        normed = self._norm(residual)
        heads = (*normed.shape[:2], -1, attention.head_dim)
        query = attention.q_proj(normed).view(heads).transpose(1, 2)
        key = attention.k_proj(normed).view(heads).transpose(1, 2)
        value = attention.v_proj(normed).view(heads).transpose(1, 2)
        query, key = mixtral.apply_rotary_pos_emb(query, key, cos, sin)
        return residual, query, key, value


class After:
    """The part after it, up to the router's choice, see `Segments`."""

    def __init__(self, layer: mixtral.MixtralDecoderLayer):
        self._output = layer.self_attn.o_proj
        self._norm = layer.post_attention_layernorm
        self._router = layer.mlp.gate

    def __call__(self, residual: Tensor, attended: Tensor) -> tuple[Tensor, ...]:
        residual = residual + self._output(attended.reshape(*residual.shape[:2], -1))
        normed = self._norm(residual).flatten(0, 1)
        _, weights, index = self._router(normed)
        return residual, normed, index, weights


def segments_of(layer: nn.Module) -> Segments | None:
    """The segments of a layer. None if a part was replaced by another class."""
    is_stock = (
        type(layer) is mixtral.MixtralDecoderLayer
        and type(layer.self_attn) is mixtral.MixtralAttention
        and type(layer.mlp) is mixtral.MixtralSparseMoeBlock
    )
    if not is_stock:
        return None
    return Segments(
        before=Before(layer),
        attention=layer.self_attn,
        eager_attention=mixtral.eager_attention_forward,
        after=After(layer),
        experts=layer.mlp.experts,
    )
