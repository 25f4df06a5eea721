"""Mixtral: the keys of its config.json, its checkpoint's names, and its transformers classes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fiddler_run.errors import FiddlerError
from fiddler_run.models.config import ModelConfig, dtype_of, positive, short
from fiddler_run.models.family import ExpertNames, Family, Segments

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

# Required keys and the largest accepted value of each. They have no default.
REQUIRED = {
    "num_hidden_layers": 1_000,
    "num_local_experts": 4_096,
    "num_experts_per_tok": 4_096,
    "hidden_size": 2**20,
    "intermediate_size": 2**20,
    "num_attention_heads": 2**16,
    "vocab_size": 2**24,
}
# transformers' defaults, for optional keys
DEFAULTS = {"num_key_value_heads": 8, "max_position_embeddings": 131_072}
ACTIVATION = "silu"  # also transformers' default
# Keys passed on to transformers. All others are ignored: the plan and the flags decide.
PASSED_ON = (
    "model_type",
    "hidden_act",
    *REQUIRED,
    *DEFAULTS,
    "head_dim",
    "rms_norm_eps",
    "initializer_range",
    "tie_word_embeddings",
    "sliding_window",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
KEYS = {
    "num_layers": "num_hidden_layers",
    "num_experts": "num_local_experts",
    "num_experts_per_tok": "num_experts_per_tok",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
}
# These compute frequencies from the length of the input, which depends on how a prompt is split
# into chunks.
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


class Mixtral(Family):
    model_type = "mixtral"

    def config(self, raw: dict, origin: str) -> ModelConfig:
        _refuse_what_cannot_run(raw, origin)
        config = {
            key: value
            for key, value in raw.items()
            if value is not None or key == "num_key_value_heads"
        }
        sizes = {key: positive(config, key, limit, origin) for key, limit in REQUIRED.items()}
        heads = sizes["num_attention_heads"]
        kv_heads = positive(
            config, "num_key_value_heads", heads, origin, DEFAULTS["num_key_value_heads"]
        )
        if sizes["num_experts_per_tok"] > sizes["num_local_experts"]:
            raise FiddlerError(
                f"{origin}: num_experts_per_tok is more than num_local_experts; correct it"
            )
        if heads % kv_heads:
            raise FiddlerError(
                f"{origin}: {heads} attention heads cannot share {kv_heads} num_key_value_heads;"
                " correct it"
            )
        head_dim = positive(config, "head_dim", 2**16, origin, sizes["hidden_size"] // heads)
        if head_dim < 2 or head_dim % 2:
            raise FiddlerError(
                f"{origin}: head_dim is {head_dim}, expected an even number; correct it"
            )
        window = None
        if "sliding_window" in config:
            window = positive(config, "sliding_window", 2**31 - 1, origin)
        tied = config.get("tie_word_embeddings", False)
        if not isinstance(tied, bool):
            raise FiddlerError(
                f"{origin}: key 'tie_word_embeddings' is {tied!r}, expected true or false"
            )
        context = DEFAULTS["max_position_embeddings"]
        return ModelConfig(
            family=self.model_type,
            **{ours: sizes[theirs] for ours, theirs in KEYS.items()},
            num_attention_heads=heads,
            vocab_size=sizes["vocab_size"],
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            max_position_embeddings=positive(
                config, "max_position_embeddings", 2**31 - 1, origin, context
            ),
            sliding_window=window,
            tie_word_embeddings=tied,
            dtype=dtype_of(config, origin),
            keys=KEYS,
            for_transformers={key: config[key] for key in PASSED_ON if key in config},
            raw=config,
        )

    def expert_prefix(self, layer: int, expert: int) -> str:
        return f"model.layers.{layer}.block_sparse_moe.experts.{expert}"

    def expert_names(self, layer: int, expert: int) -> ExpertNames:
        prefix = self.expert_prefix(layer, expert)
        return ExpertNames(f"{prefix}.w1.weight", f"{prefix}.w3.weight", f"{prefix}.w2.weight")

    def dense_name(self, parameter: str) -> str:
        return parameter.replace(".mlp.", ".block_sparse_moe.")

    def stock_class(self) -> type[PreTrainedModel]:
        from transformers import MixtralForCausalLM

        return MixtralForCausalLM

    def stock_config(self, config: ModelConfig) -> PreTrainedConfig:
        from transformers import MixtralConfig

        return MixtralConfig(**config.for_transformers)

    def experts_modules(self, model: PreTrainedModel) -> list[nn.Module]:
        return [layer.mlp.experts for layer in model.model.layers]

    def segments(self, layer: nn.Module) -> Segments | None:
        from fiddler_run.models.mixtral_layer import segments

        return segments(layer)


def _refuse_what_cannot_run(config: dict, origin: str) -> None:
    activation = config.get("hidden_act", ACTIVATION)
    if activation != ACTIVATION:
        raise FiddlerError(
            f"{origin}: hidden_act is {short(activation)}; only {ACTIVATION!r} is supported"
        )
    quantization = config.get("quantization_config")
    if quantization:
        method = (
            quantization.get("quant_method", "unknown")
            if isinstance(quantization, dict)
            else "unknown"
        )
        raise FiddlerError(
            f"{origin}: quantization_config says that the weights are quantised ({short(method)});"
            " name the original, unquantised checkpoint (or, if these weights are not quantised,"
            " remove quantization_config)"
        )
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope_type = (rope.get("rope_type") or rope.get("type")) if isinstance(rope, dict) else None
    if rope_type in LENGTH_DEPENDENT_ROPE:
        raise FiddlerError(
            f"{origin}: rope_type {rope_type!r} depends on the length of a whole prompt, which runs"
            " in chunks; it is not supported"
        )
