"""Sizes of Mixtral-8x7B, computed by hand from its published config."""

import pytest

from fiddler_opt.inputs.model import DEFAULT_MODEL, ModelSpec
from fiddler_run.errors import FiddlerError


@pytest.fixture(scope="module")
def mixtral() -> ModelSpec:
    return ModelSpec.load(DEFAULT_MODEL)


def test_expert_sizes(mixtral):
    # gate, up and down: 3 matrices of 4096 x 14336 in 2 bytes
    assert mixtral.block_neurons == 896
    assert mixtral.encoding == "bf16"
    assert mixtral.blocks_per_expert == 16
    assert mixtral.block_bytes == 22_020_096
    assert mixtral.expert_bytes == 352_321_536


@pytest.mark.parametrize(
    ("hidden_size", "neurons", "top_k", "block_neurons", "packed"),
    [
        # 16 blocks at most: 16 x 896 = 14336 and 16 x 1024 = 16384, 10 x 640 = 6400
        (4096, 14336, 2, 896, 896),  # Mixtral-8x7B
        (6144, 16384, 2, 1024, 1024),  # Mixtral-8x22B
        (4096, 6400, 2, 640, 640),  # Phi-3.5-MoE: 416 would pad it by 4%
        (4096, 1408, 8, 128, 128),  # GLM-4.5-Air, 11 blocks of 3 MiB: 96 would pad it by 2%
        (2880, 2880, 4, 192, 192),  # gpt-oss: 15 blocks of 3.2 MiB
        # at least 1 MiB, which is 86 neurons of 3 x 2048 weights; 256 neurons if that divides
        (2048, 768, 8, 256, 256),  # Qwen3-30B-A3B: 3 blocks, and 24 of all called experts
        (2048, 512, 10, 256, 256),  # Qwen3-Next-80B-A3B: 2 blocks
        (2048, 1024, 8, 256, 256),  # OLMoE-1B-7B: 4 blocks
        (1536, 512, 8, 256, 256),  # Granite-3.1-3b-a800m: 2 blocks
        (2816, 704, 8, 64, 64),  # Gemma-4-26B-A4B: others up to 4 MiB would pad it
        (2688, 1856, 6, 192, 192),  # Nemotron-3-Nano: no multiple of 32 from 116 to 256 divides it
        # 16 blocks of all called experts
        (2048, 768, 2, 96, 128),
        (2048, 768, 4, 192, 192),
        # toys, of less than 4 MiB
        (1536, 448, 8, 32, 64),
        (128, 256, 2, 32, 64),
    ],
)
def test_block_sizes(mixtral, hidden_size, neurons, top_k, block_neurons, packed):
    sizes = {
        "num_hidden_layers": 1,
        "hidden_size": hidden_size,
        "intermediate_size": neurons,
        "num_local_experts": 128,
        "num_experts_per_tok": top_k,
    }
    model = ModelSpec.from_config({**mixtral.config.raw, **sizes}, "m", "here")
    assert model.block_neurons == block_neurons
    if "lossless12" in model.encodings:
        assert model.in_encoding("lossless12").block_neurons == packed


def test_several_ranks_divide_smaller_blocks(mixtral):
    """A rank's part of an expert has up to 16 blocks."""
    assert [mixtral.for_ranks(count).block_neurons for count in (1, 2, 3, 4)] == [
        896,
        448,
        448,
        224,
    ]
    packed = mixtral.in_encoding("lossless12").for_ranks(2)
    assert (packed.block_neurons, packed.blocks_per_expert) == (448, 32)


def test_non_expert_bytes(mixtral):
    # 46,702,792,704 parameters, of which 256 experts of 176,160,768
    assert mixtral.non_expert_bytes == 2 * (46_702_792_704 - 256 * 176_160_768)


def test_dense_layer_bytes(mixtral):
    # q and o 4096 x 4096, k and v 4096 x 1024, router 8 x 4096, two norms of 4096
    assert mixtral.dense_layer_bytes == 2 * (2 * 16_777_216 + 2 * 4_194_304 + 32_768 + 8_192)


def test_kv_bytes_per_token(mixtral):
    # 32 layers x (keys + values) x 8 heads x 128 x 2 bytes
    assert mixtral.sizes.kv_bytes_per_token == 131_072
    assert mixtral.sizes.state_bytes == 0


@pytest.mark.parametrize(
    ("changes", "heads"),
    [
        ({}, 0),
        ({"torch_dtype": "float32"}, 32),  # 8 heads of keys are shared: no fused kernel does that
        ({"torch_dtype": "float32", "num_key_value_heads": 32}, 0),
        ({"model_type": "granitemoe_swa", "num_hidden_layers": 1}, 32),  # has attention sinks
    ],
)
def test_heads_whose_scores_are_kept(mixtral, changes, heads):
    model = ModelSpec.from_config({**mixtral.config.raw, **changes}, "m", "here")
    assert model.sizes.score_heads == heads


def test_indivisible_expert_is_padded(mixtral):
    sizes = {"num_hidden_layers": 1, "intermediate_size": 100}
    narrow = ModelSpec.from_config({**mixtral.config.raw, **sizes}, "m", "here")
    assert narrow.block_neurons == 32
    assert narrow.blocks_per_expert == 4
    assert narrow.expert_bytes == 4 * 3 * 32 * 4096 * 2


def test_tied_embeddings_count_once(mixtral):
    tied = ModelSpec.from_config(
        {**mixtral.config.raw, "tie_word_embeddings": True}, "tied", "here"
    )
    assert mixtral.head_bytes - tied.head_bytes == 32_000 * 4096 * 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "here: model_type is 'llama', which has no experts"),
        ({"model_type": "t5"}, "'t5', for which transformers has no causal language model"),
        ({"model_type": "new"}, "'new', which this version of transformers does not know"),
        ({"torch_dtype": "int8"}, "dtype 'int8' is not supported"),
        ({"hidden_act": "gelu"}, "the experts of 'mixtral' use an activation of their own"),
        (
            {"num_hidden_layers": "6"},
            "transformers cannot use it: .*'num_hidden_layers' expected int, got str",
        ),
        ({"num_hidden_layers": 10**9}, "'num_hidden_layers' is 1000000000, expected a number up"),
        ({"hidden_size": -5}, "transformers cannot use it: .*negative dimension"),
        ({"num_experts_per_tok": 9}, "transformers cannot use it: k not in range"),
        ({"max_position_embeddings": 0}, "max_position_embeddings"),
    ],
)
def test_unsupported_configs_are_refused(mixtral, changes, message):
    with pytest.raises(FiddlerError, match=message):
        ModelSpec.from_config({**mixtral.config.raw, **changes}, "m", "here")
