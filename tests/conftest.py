"""Fixtures: the demo checkpoint, small random checkpoints, and plans written by hand for them."""

import os
import random
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before PyTorch is imported: waiting threads leave their cores to others

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from fiddler_run.plan import GpuMemory, HostMemory, ModelShape, Plan, Predicted, Provenance, Rates, Workload

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "examples" / "tiny-mixtral"

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where a plan's GPU part runs here."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def demo_shape(dtype: str = "float32") -> ModelShape:
    return ModelShape(
        name=str(DEMO),
        num_layers=6,
        num_experts=8,
        num_experts_per_tok=2,
        hidden_size=128,
        intermediate_size=256,
        dtype=dtype,
    )


def make_plan(
    shape: ModelShape,
    resident: list[list[int]],
    block_neurons: int = 32,
    share: dict[int, float] | None = None,
    threads: int = 1,
    on_disk: list[list[int]] | None = None,
) -> Plan:
    """A plan with the given resident blocks, and those on disk, for one GB of GPU memory."""
    block_bytes = shape.block_bytes(block_neurons)
    placed, spilt = (sum(map(sum, rows)) * block_bytes for rows in (resident, on_disk or [[]]))
    everything = shape.num_layers * shape.num_experts * shape.expert_bytes(block_neurons)
    gpu = GpuMemory(
        total=2**30,
        non_expert_weights=0,
        kv_cache=0,
        staging=3 * block_bytes,
        activations=0,
        reserve=0,
        experts=placed,
    )
    return Plan(
        version=2,
        model=shape,
        workload=Workload(prompt_tokens=16, output_tokens=64, num_beams=4, batch_size=1, max_seq_len=256),
        gpu_memory_bytes=gpu,
        host_memory_bytes=HostMemory(experts=everything - placed - spilt, embedding=0),
        disk_bytes=spilt,
        device="cuda",
        cpu_threads=threads,
        cpu_pinned=threads > 1,
        prefill_chunk_tokens=128,
        block_neurons=block_neurons,
        stream_share=share or {1: 0.0},
        resident_blocks=dict(enumerate(resident)),
        disk_blocks=dict(enumerate(on_disk)) if on_disk else {},
        predicted=Predicted(
            decode_tokens_per_s=1.0,
            ttft_s=1.0,
            gpu_hit_rate=0.5,
            bound_tokens_per_s=1.0,
            gap=0.0,
            decode_ms={"absent": 1000.0},
            ttft_ms={"absent": 1000.0},
            binding="GPU memory",
            next_gb_tokens_per_s=0.1,
            regret={},
            alternatives={},
        ),
        bytes_per_s=Rates(resident=4e9, link=1e9, cpu=2e9, absent=3e9),
        provenance=Provenance(
            command="by hand",
            machine="none",
            machine_sha256="",
            machine_source="measured",
            routing="none",
            solver="none",
            status="none",
            solve_s=0.0,
            created="2026-01-01",
        ),
    )


def set_key(data: dict, keys: list[str], value) -> None:
    """Sets what lies at the end of the keys, numbers among them as text, or, for the value `...`, removes it."""
    *parents, last = [int(key) if key.isdigit() else key for key in keys]
    for key in parents:
        data = data[key]
    if value is ...:
        del data[last]
    else:
        data[last] = value


def random_plan(shape: ModelShape, rng: random.Random, block_neurons: int = 32, max_threads: int = 2) -> Plan:
    """Any number of resident blocks for each expert, any stream share for few and for many tokens, any thread count; for every
    other plan, any number of blocks on disk."""
    blocks = shape.blocks_per_expert(block_neurons)
    resident = [[rng.randint(0, blocks) for _ in range(shape.num_experts)] for _ in range(shape.num_layers)]
    share = {1: rng.random(), rng.randint(2, 40): rng.choice([0.0, rng.random(), 1.0])}
    on_disk = [[rng.randint(0, blocks - count) for count in row] for row in resident] if rng.random() < 0.5 else None
    return make_plan(shape, resident, block_neurons, share, rng.randint(1, max_threads), on_disk)


@pytest.fixture(scope="session")
def random_checkpoint(tmp_path_factory):
    """Makes a checkpoint of random weights: (folder, shape of it in float32), for overrides of a small Mixtral config."""

    def make(**overrides) -> tuple[Path, ModelShape]:
        torch.manual_seed(0)
        values = {
            "vocab_size": 768,  # that of the demo's tokenizer
            "hidden_size": 32,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "max_position_embeddings": 128,
            "initializer_range": 0.2,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        }
        config = MixtralConfig(**{**values, **overrides})
        folder = tmp_path_factory.mktemp("checkpoint")
        MixtralForCausalLM(config).save_pretrained(folder)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (folder / file).write_bytes((DEMO / file).read_bytes())
        shape = ModelShape(
            name=str(folder),
            num_layers=config.num_hidden_layers,
            num_experts=config.num_local_experts,
            num_experts_per_tok=config.num_experts_per_tok,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            dtype="float32",
        )
        return folder, shape

    return make
