"""Measures a model's sizes on a model without data: by its parameters, and by passing tokens."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fiddler_run.errors import FiddlerError
from fiddler_run.models.config import ModelConfig
from fiddler_run.models.dispatched import DispatchedModel, skeleton
from fiddler_run.models.experts import experts_modules, experts_of, parameter_names
from fiddler_run.models.sizes import ModelSizes
from fiddler_run.models.stock import context_limit, naming
from fiddler_run.plan.shape import ModelShape

FEW_TOKENS = 8
MORE_TOKENS = 16


@dataclass
class _Choices:
    """Stands in for the experts of a layer, and records how many of them a token chooses."""

    counts: set[int] = field(default_factory=set)

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, _: Tensor) -> Tensor:
        self.counts.add(top_k_index.shape[-1])
        return torch.zeros_like(hidden_states)


def described(
    config: ModelConfig, name: str, dtype: str, base: type[DispatchedModel] = DispatchedModel
) -> tuple[DispatchedModel, ModelShape, ModelSizes]:
    """The model of a config.json, without data, and its sizes. A plan will call it `name`.

    Raises:
        FiddlerError: transformers cannot run such a model, or the runtime its experts.
    """
    model = skeleton(config, getattr(torch, dtype), base)
    key = _key(config, dtype)
    if key not in _SIZES:
        with naming(config.origin):
            _SIZES[key] = _describe(model, name, dtype)
    return model, *_named(key, name)


def sizes_of(config: ModelConfig, name: str, dtype: str) -> tuple[ModelShape, ModelSizes]:
    """The sizes of the model of a config.json. Raises as `described`."""
    key = _key(config, dtype)
    if key not in _SIZES:
        described(config, name, dtype)
    return _named(key, name)


# by config and dtype: a command asks for a model's sizes several times
_SIZES: dict[tuple[str, str], tuple[ModelShape, ModelSizes]] = {}


def _key(config: ModelConfig, dtype: str) -> tuple[str, str]:
    return json.dumps(config.raw, sort_keys=True), dtype


def _named(key: tuple[str, str], name: str) -> tuple[ModelShape, ModelSizes]:
    shape, sizes = _SIZES[key]
    return shape.model_copy(update={"name": name}), sizes


def _describe(model: DispatchedModel, name: str, dtype: str) -> tuple[ModelShape, ModelSizes]:
    modules = experts_modules(model)
    if not modules:
        raise FiddlerError(
            f"model_type is {model.config.model_type!r}, which has no experts, or none that"
            " transformers lets others compute; docs/models.md lists the models that run"
        )
    kinds = {
        experts_of(module, model.expert_shapes[f"{path}.{parameter_names(module)[0]}"])
        for path, module in modules.items()
    }
    if len(kinds) > 1:
        raise FiddlerError("its layers have different kinds of experts, which is not supported")
    (experts,) = kinds
    choices = _Choices()
    few, more = (_cache_bytes(model, tokens, choices) for tokens in (FEW_TOKENS, MORE_TOKENS))
    kv_bytes = (more - few) // (MORE_TOKENS - FEW_TOKENS)
    shape = ModelShape(
        name=name,
        num_layers=len(modules),
        num_experts_per_tok=max(choices.counts),
        dtype=dtype,
        **experts._asdict(),
    )
    config = model.config
    layers, first_layer = _decoder_layers(model)
    of_layers = sum(_bytes_of(layer) for layer in layers[first_layer:])
    sizes = ModelSizes(
        family=config.model_type,
        vocab_size=config.vocab_size,
        max_position_embeddings=context_limit(config),
        tie_word_embeddings=_is_tied(model),
        dense_bytes=_bytes_of(model),
        dense_layer_bytes=of_layers // len(modules),
        embedding_bytes=_bytes_of(model.get_input_embeddings()),
        kv_bytes_per_token=kv_bytes,
        state_bytes=few - FEW_TOKENS * kv_bytes,
        attended_elements=_attended_elements(config),
        score_heads=_score_heads(config, dtype),
    )
    return shape, sizes


def _cache_bytes(model: DispatchedModel, tokens: int, choices: _Choices) -> int:
    """Bytes of the KV cache after `tokens` tokens of one sequence."""
    for module in model.experts_modules():
        module.planned = choices
    ids = torch.zeros((1, tokens), dtype=torch.long, device="meta")
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
    held = {id(each): each for part in (cache, *cache.layers) for each in _tensors(vars(part))}
    return sum(tensor.nbytes for tensor in held.values())


def _tensors(held: object) -> list[Tensor]:
    """The tensors in an object's attributes, lists and dicts."""
    if isinstance(held, Tensor):
        return [held]
    if isinstance(held, dict):
        return [tensor for each in held.values() for tensor in _tensors(each)]
    if isinstance(held, list | tuple):
        return [tensor for each in held for tensor in _tensors(each)]
    return []


def first_expert_layer(model: DispatchedModel) -> tuple[int, int]:
    """The number of the first decoder layer with experts, and the number of decoder layers."""
    layers, first = _decoder_layers(model)
    return first, len(layers)


def _decoder_layers(model: DispatchedModel) -> tuple[nn.ModuleList, int]:
    """The decoder layers, and which of them is the first with experts."""
    parts = next(iter(experts_modules(model))).split(".")
    for stop, part in enumerate(parts):
        found = model.get_submodule(".".join(parts[:stop]))
        if isinstance(found, nn.ModuleList):
            return found, int(part)
    raise AssertionError("the experts are in no list of layers")


def _bytes_of(module: nn.Module) -> int:
    tensors = {id(each): each for each in module.state_dict(keep_vars=True).values()}
    return sum(tensor.nbytes for tensor in tensors.values())


def _is_tied(model: DispatchedModel) -> bool:
    head = model.get_output_embeddings()
    return head is not None and bool(model.config.tie_word_embeddings)


def _attended_elements(config) -> int:
    """Elements of a token's keys and values for all heads, in the largest layer."""
    heads = _largest(config, "num_attention_heads", "num_key_value_heads")
    usual = _largest(config, "head_dim", "global_head_dim") or -(-config.hidden_size // heads)
    key = max(usual, _largest(config, "qk_nope_head_dim") + _largest(config, "qk_rope_head_dim"))
    return heads * (key + max(usual, _largest(config, "v_head_dim")))


def _score_heads(config, dtype: str) -> int:
    """See `ModelSizes`. PyTorch's fused kernels share keys among heads only in 16 bits."""
    heads = _largest(config, "num_attention_heads")
    shared = 0 < _largest(config, "num_key_value_heads") < heads
    fused = config._attn_implementation == "sdpa" and not (shared and dtype == "float32")
    return 0 if fused else heads


def _largest(config, *names: str) -> int:
    """The largest of these sizes in any layer, or 0."""
    layers = getattr(config, "per_layer_config", None) or [config]
    return max(getattr(layer, name, None) or 0 for layer in layers for name in names)
