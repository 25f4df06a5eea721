"""Tiny random models of every family that the runtime can run: four layers, eight experts."""

import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
)

# Set where a config class has the key. Families name the same size differently.
SIZES = {
    "vocab_size": 768,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "sliding_window": 8,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 8),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts"), 2),
    **dict.fromkeys(
        (
            "moe_intermediate_size",
            "expert_ffn_hidden_size",
            "shared_expert_intermediate_size",
            "shared_intermediate_size",
        ),
        80,
    ),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group"), 1),
    **dict.fromkeys(
        ("first_k_dense_replace", "moe_layer_start_index", "num_dense_layers", "n_shared_experts"),
        1,
    ),
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "chunk_size", "mamba_chunk_size"), 16),
    **dict.fromkeys(("mamba_n_groups", "n_groups"), 1),
    "mamba_dt_rank": 8,
    "mamba_expand": 2,
}
# multi-head latent attention has as many keys as heads, and only a part of them is rotated
LATENT = {"num_key_value_heads": 4, "head_dim": 8}
LINEAR = ["linear_attention", "linear_attention", "linear_attention", "full_attention"]
MAMBA = ["mamba", "attention", "mamba", "attention"]
FAMILIES: dict[str, dict] = {
    "afmoe": {},
    "aria_text": {},
    "axk1": LATENT,
    "bailing_hybrid": {**LATENT, "layer_group_size": 2},
    "beam": {},
    "cohere2_moe": {},
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "deepseek_v4": {},
    "dots1": {},
    "ernie4_5_moe": {},
    "exaone_moe": {},
    "flex_olmo": {},
    "flint": {},
    "gemma4_text": {
        "enable_moe_block": True,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "vocab_size_per_layer_input": 768,
        "hidden_size_per_layer_input": 16,
    },
    "glm4_moe": {},
    "glm4_moe_lite": LATENT,
    "granitemoe": {},
    "granitemoe_swa": {},
    "granitemoehybrid": {"layer_types": MAMBA},
    "granitemoeshared": {},
    "hunyuan_v1_moe": {},
    "hy_v3": {},
    "hy_v4": LATENT,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "kimi_linear": {**LATENT, "layer_types": LINEAR},
    "kolibri1": {},
    "laguna": {},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mellum": {},
    "mimo_v2_flash": {},
    "minimax": {},
    "minimax_m2": {},
    "minimax_m3_vl_text": {},
    "mixtral": {},
    "nemotron_h": {"layers_block_type": ["mamba", "moe", "attention", "moe"]},
    "olmoe": {},
    "phimoe": {},
    "qwen2_moe": {},
    "qwen3_5_moe_text": {"layer_types": LINEAR},
    "qwen3_moe": {},
    "qwen3_next": {"layer_types": LINEAR},
    "solar_open": {},
}


def tiny_config(model_type: str, **more: object) -> PreTrainedConfig:
    """A small config of a family, with `more` keys."""
    config_class = CONFIG_MAPPING[model_type]
    known = config_class()
    sizes = {key: size for key, size in SIZES.items() if _has(known, key)}
    return config_class(**{**sizes, **FAMILIES[model_type], **more})


def stock_model(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A model of transformers' own class with random weights, in float32."""
    torch.manual_seed(seed)
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).eval()


def _has(config: PreTrainedConfig, key: str) -> bool:
    try:
        return hasattr(config, key)
    except Exception:  # a config that differs between layers raises its own type
        return True
