"""Writes a BF16 GGUF of a Mixtral or Qwen3-MoE model without a checkpoint, for llama.cpp.

    pip install gguf
    python benchmarks/random_gguf.py CONFIG mixtral.gguf

Experts are zeros, stored as holes in the file: Mixtral-8x7B needs 3.3 GB of disk instead of 93.
All other weights are random: routing is nearly uniform.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

NORMS = ("attn_norm", "ffn_norm")
ARCHITECTURES = {"mixtral": "llama", "qwen3_moe": "qwen3moe"}  # GGUF's names


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", metavar="CONFIG", help="a config.json")
    parser.add_argument("output", metavar="FILE")
    flags = parser.parse_args()
    config = json.loads(Path(flags.config).read_text())
    writer = gguf.GGUFWriter(None, ARCHITECTURES[config["model_type"]])
    sizes = Sizes.of(config)
    add_keys(writer, config, sizes)
    for name, shape in matrices(config, sizes).items():
        writer.add_tensor_info(
            name, (*shape[:-1], 2 * shape[-1]), np.dtype(np.uint8), 2 * int(np.prod(shape)),
            raw_dtype=gguf.GGMLQuantizationType.BF16,
        )  # fmt: skip
    for name, shape in vectors(config, sizes).items():
        writer.add_tensor_info(name, shape, np.dtype(np.float32), 4 * int(np.prod(shape)))
    writer.write_header_to_file(Path(flags.output))
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    write_tensors(writer)


@dataclass(frozen=True)
class Sizes:
    """Sizes that the two families name differently, or leave out. `width`: of an expert."""

    hidden: int
    width: int
    experts: int
    head: int
    query: int
    key: int

    @classmethod
    def of(cls, config: dict) -> "Sizes":
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        head = config.get("head_dim") or hidden // heads
        return cls(
            hidden,
            config.get("moe_intermediate_size") or config["intermediate_size"],
            config.get("num_local_experts") or config["num_experts"],
            head,
            head * heads,
            head * config["num_key_value_heads"],
        )


def add_keys(writer: gguf.GGUFWriter, config: dict, sizes: Sizes) -> None:
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(sizes.hidden)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_expert_feed_forward_length(sizes.width)
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(sizes.head)
    writer.add_value_length(sizes.head)
    writer.add_rope_dimension_count(sizes.head)
    writer.add_rope_freq_base(config.get("rope_theta") or config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_expert_count(sizes.experts)
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(config["vocab_size"])


def matrices(config: dict, sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights that are stored in bfloat16, by name."""
    hidden, width, experts = sizes.hidden, sizes.width, sizes.experts
    vocabulary = config["vocab_size"]
    shapes = {"token_embd.weight": (vocabulary, hidden), "output.weight": (vocabulary, hidden)}
    for layer in range(config["num_hidden_layers"]):
        block = f"blk.{layer}."
        shapes |= {
            block + "attn_q.weight": (sizes.query, hidden),
            block + "attn_k.weight": (sizes.key, hidden),
            block + "attn_v.weight": (sizes.key, hidden),
            block + "attn_output.weight": (hidden, sizes.query),
            block + "ffn_gate_exps.weight": (experts, width, hidden),
            block + "ffn_up_exps.weight": (experts, width, hidden),
            block + "ffn_down_exps.weight": (experts, hidden, width),
        }
    return shapes


def vectors(config: dict, sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights that are stored in float32, by name: norms and routers."""
    norms = dict.fromkeys(NORMS, sizes.hidden)
    if config["model_type"] == "qwen3_moe":
        norms |= {"attn_q_norm": sizes.head, "attn_k_norm": sizes.head}
    shapes = {"output_norm.weight": (sizes.hidden,)}
    for layer in range(config["num_hidden_layers"]):
        shapes |= {f"blk.{layer}.{name}.weight": (size,) for name, size in norms.items()}
        shapes[f"blk.{layer}.ffn_gate_inp.weight"] = (sizes.experts, sizes.hidden)
    return shapes


def write_tensors(writer: gguf.GGUFWriter) -> None:
    """Writes random weights behind the header, and leaves holes for experts."""
    file = writer.fout[0]
    writer.write_padding(file, file.tell())
    random = np.random.default_rng(0)
    for name, tensor in writer.tensors[0].items():
        end = file.tell() + gguf.GGUFWriter.ggml_pad(tensor.nbytes, writer.data_alignment)
        if "norm" in name:
            file.write(np.ones(tensor.nbytes // 4, np.float32).tobytes())
        elif tensor.dtype == gguf.GGMLQuantizationType.F32:
            file.write(noise(random, tensor.nbytes // 4).tobytes())
        elif "exps" not in name:
            # The upper half of a float32 is a bfloat16.
            file.write((noise(random, tensor.nbytes // 2).view(np.uint32) >> 16).astype(np.uint16))
        file.seek(end)
    file.truncate()
    writer.close()


def noise(random: np.random.Generator, count: int) -> np.ndarray:
    """Normal noise. The same numbers are repeated, because drawing all would take a minute."""
    return np.resize(random.standard_normal(2**20, np.float32) * np.float32(0.02), count)


if __name__ == "__main__":
    main()
