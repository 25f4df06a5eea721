"""Small models, machines and routings for the planner's tests."""

import random
from itertools import combinations

from fiddler_opt.machine import Cpu, Device, Link, MachineProfile, Made, MeasuredShape, Memory
from fiddler_opt.model import ModelSpec
from fiddler_opt.routing import PhaseRouting, Routing

PAIRS = {count: list(combinations(range(count), 2)) for count in range(1, 9)}


def small_model(**overrides) -> ModelSpec:
    """Two layers of four experts, 128 neurons each in four blocks; overrides name config.json's or ModelShape's keys."""
    names = {"num_layers": "num_hidden_layers", "num_experts": "num_local_experts"}
    config = {
        "model_type": "mixtral",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "vocab_size": 100,
        "max_position_embeddings": 256,
        "dtype": "bfloat16",
    }
    config.update({names.get(key, key): value for key, value in overrides.items()})
    return ModelSpec.from_config(config, "small", "here")


def machine_profile(
    model: ModelSpec,
    device: float = 10.0,
    absent: float = 80.0,
    dense: float = 1.0,
    head: float = 1.0,
    dense_device: float | None = None,
    share: float = 0.25,
    cpu: float | None = None,
    disk_bytes_per_s: float | None = None,
    kind: str = "cuda",
    memory_bytes: int = 10**9,
    context_bytes: int = 0,
) -> MachineProfile:
    """Microseconds of a machine on `model`'s own shape: flat in tokens up to 8, then in proportion to them.

    `absent`: of an expert in host memory at the best `share`; `cpu`: by the CPU alone (None: a little more than that).
    `dense_device`: the device's part of `dense` (None: all of it).
    """

    def flat(microseconds: float) -> dict[int, float]:
        return {1: microseconds, 8: microseconds}

    on_gpu = kind == "cuda"
    by_share = {0.0: cpu or absent * 1.01, share: absent, 1.0: absent * 1.5} if on_gpu else {0.0: absent}
    return MachineProfile(
        version=2,
        source="measured",
        cpu=Cpu(
            name="cpu",
            cores=2,
            physical_cores=2,
            kernel="avx2",
            threads=2,
            pinned=False,
            threads_us={1: 90.0, 2: 80.0},
            pinned_threads_us={1: 90.0, 2: 80.0},
        ),
        memory=Memory(available_bytes=10**9, timed_bytes=10**8, memlock_bytes=None),
        device=Device(kind=kind, name="device", memory_bytes=memory_bytes, free_bytes=memory_bytes, context_bytes=context_bytes),
        link=Link(
            generation=4,
            width=16,
            h2d_bytes_per_s=1e9,
            h2d_pageable_bytes_per_s=2e8,
            d2h_bytes_per_s=1e9,
            round_trip_us=20.0,
        )
        if on_gpu
        else None,
        disk_bytes_per_s=disk_bytes_per_s,
        shape=MeasuredShape.of(model),
        absent_expert_us={1: by_share, 8: by_share},
        device_expert_us=flat(device),
        dense_layer_us=flat(dense),
        dense_device_us=flat(dense if dense_device is None else dense_device),
        head_us=flat(head),
        host_embedding_us={1: 2.0} if on_gpu else None,
        spread={},
        provenance=Made(command="by hand", created="2026-01-01", software="none"),
    )


def random_routing(model: ModelSpec, rng: random.Random) -> Routing:
    """Skewed choices: pair probabilities drawn at random, some zero, and the experts' that follow from them."""
    experts, top_k = model.shape.num_experts, model.shape.num_experts_per_tok
    expert, pair = [], []
    for _ in range(model.shape.num_layers):
        weights = [rng.choice([0.0, 1.0, 1.0]) * rng.random() ** 3 for _ in PAIRS[experts]]
        weights[0] += 0.01
        chances = {p: w / sum(weights) for p, w in zip(PAIRS[experts], weights, strict=True)}
        pair.append(chances)
        expert.append([sum(c for p, c in chances.items() if e in p) * top_k / 2 for e in range(experts)])
    return routed("random", expert, pair)


def routed(origin: str, expert: list[list[float]], pair: list[dict[tuple[int, int], float]]) -> Routing:
    """The same routing in prefill and decode."""
    phase = PhaseRouting(expert, pair)
    return Routing(origin, phase, phase)
