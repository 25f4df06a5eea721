"""Fixtures: the demo checkpoint, small random checkpoints, and plans written by hand for them.

Only fixtures that need PyTorch and transformers import them: planning tests run without.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

# Set before PyTorch is imported: each pytest process computes with one thread, which yields its
# core while it waits.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
from server import served  # noqa: F401

from fiddler_run.encodings.table import ENCODINGS, plain_encoding
from fiddler_run.plan.prediction import Predicted, Provenance, Rates
from fiddler_run.plan.rank import GpuMemory, HostMemory, Rank
from fiddler_run.plan.schema import Budget, Plan, Workload
from fiddler_run.plan.shape import ModelShape

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "examples" / "tiny-mixtral"
PREDICTED = Predicted(
    decode_tokens_per_s=1.0,
    ttft_s=1.0,
    gpu_hit_rate=0.5,
    bound_tokens_per_s=1.0,
    gap=0.0,
    decode_ms={"host": 1000.0},
    ttft_ms={"host": 1000.0},
    binding="GPU memory",
    next_gb_tokens_per_s=0.1,
    regret={},
    alternatives={},
)
PROVENANCE = Provenance(
    command="by hand",
    machine="none",
    machine_sha256="",
    machine_source="measured",
    routing="none",
    solver="none",
    status="none",
    solve_s=0.0,
    created="2026-01-01",
)
SMALL_CONFIG = {
    "vocab_size": 768,
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
    encoding: str | None = None,
) -> Plan:
    """A plan with these resident and disk blocks, for 1 GiB of GPU memory."""
    encoding = encoding or plain_encoding(shape.dtype)
    blocks = ENCODINGS[encoding](shape.hidden_size, block_neurons, shape.activation.gated)
    block_bytes = blocks.block_bytes
    resident_bytes, disk_bytes = (
        sum(map(sum, rows)) * block_bytes for rows in (resident, on_disk or [[]])
    )
    all_bytes = shape.num_layers * shape.num_experts * blocks.expert_bytes(shape.intermediate_size)
    gpu = GpuMemory(
        total=2**30,
        non_expert_weights=0,
        kv_cache=0,
        staging=3 * block_bytes,
        activations=0,
        reserve=0,
        experts=resident_bytes,
    )
    rank = Rank(
        device="cuda",
        gpu_memory_bytes=gpu,
        host_memory_bytes=HostMemory(experts=all_bytes - resident_bytes - disk_bytes, embedding=0),
        disk_bytes=disk_bytes,
        cpu_threads=threads,
        cpu_pinned=threads > 1,
        stream_share=share or {1: 0.0},
        resident_blocks=dict(enumerate(resident)),
        disk_blocks=dict(enumerate(on_disk)) if on_disk else {},
    )
    return Plan(
        version=3,
        model=shape,
        encoding=encoding,
        workload=Workload(
            prompt_tokens=16, output_tokens=64, num_beams=4, batch_size=1, max_seq_len=256
        ),
        budget=Budget(gpu_bytes=2**30),
        prefill_chunk_tokens=128,
        block_neurons=block_neurons,
        ranks=[rank],
        predicted=PREDICTED,
        bytes_per_s=Rates(resident=4e9, link=1e9, cpu=2e9, host=3e9),
        provenance=PROVENANCE,
    )


def with_rank(plan: Plan, **update: object) -> Plan:
    """A copy of the plan with these fields of its rank changed."""
    return plan.model_copy(update={"ranks": [plan.rank.model_copy(update=update)]})


def set_key(data: dict, keys: list[str], value: object) -> None:
    """Sets the value at a path of keys; the value `...` removes the last key.

    Keys made of digits are list indices or integer keys.
    """
    *parents, last = [int(key) if key.isdigit() else key for key in keys]
    for key in parents:
        data = data[key]
    if value is ...:
        del data[last]
    else:
        data[last] = value


def random_plan(
    shape: ModelShape, rng: random.Random, block_neurons: int = 32, max_threads: int = 2, **more
) -> Plan:
    """A plan with random resident blocks, stream shares, thread count and perhaps disk blocks.

    `more`: for `make_plan`.
    """
    blocks = -(-shape.intermediate_size // block_neurons)
    resident = [
        [rng.randint(0, blocks) for _ in range(shape.num_experts)] for _ in range(shape.num_layers)
    ]
    share = {1: rng.random(), rng.randint(2, 40): rng.choice([0.0, rng.random(), 1.0])}
    on_disk = (
        [[rng.randint(0, blocks - count) for count in row] for row in resident]
        if rng.random() < 0.5
        else None
    )
    threads = rng.randint(1, max_threads)
    return make_plan(shape, resident, block_neurons, share, threads, on_disk, **more)


@pytest.fixture(scope="session")
def device():
    """The device of a plan's GPU part: CUDA if available, else the CPU."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def place() -> Callable:
    """Places the demo model's experts by a plan, and returns the model and its tokenizer.

    All calls for one dtype share one model: the next call moves its experts.
    """
    from models import move_experts

    from fiddler_run import load_model

    load = cache(lambda dtype: load_model(make_plan(demo_shape(dtype), [[0] * 8] * 6), DEMO))

    def place(plan: Plan):
        model, tokenizer = load(plan.model.dtype)
        move_experts(model, plan, DEMO)
        return model, tokenizer

    return place


@pytest.fixture(scope="session")
def stock(device):
    """The demo model in stock transformers, with its answers cached."""
    from models import Stock

    return Stock(DEMO, device)


@pytest.fixture(scope="session")
def random_checkpoint(tmp_path_factory) -> Callable[..., tuple[Path, ModelShape]]:
    """Writes a checkpoint of random weights; returns its folder and its shape in float32.

    Keyword arguments override keys of SMALL_CONFIG, which has the demo tokenizer's vocabulary.
    """

    def make(**overrides: object) -> tuple[Path, ModelShape]:
        import torch
        from transformers import MixtralConfig, MixtralForCausalLM

        torch.manual_seed(0)
        config = MixtralConfig(**{**SMALL_CONFIG, **overrides})
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


@pytest.fixture
def model(tmp_path) -> Path:
    """A copy of the demo checkpoint, which the test may change."""
    return shutil.copytree(DEMO, tmp_path / "model")
