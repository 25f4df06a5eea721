"""Small models, machines and routings for the planner's tests."""

import json
import random
from itertools import combinations
from pathlib import Path

from fiddler_opt.inputs.machine import (
    Cpu,
    Device,
    KernelLimits,
    Link,
    MachineProfile,
    MeasuredShape,
    Memory,
    ProfileProvenance,
)
from fiddler_opt.inputs.machine_parts import Network
from fiddler_opt.inputs.machine_ranks import joined
from fiddler_opt.inputs.model import DEFAULT_MODEL, ModelSpec
from fiddler_opt.inputs.routing import PhaseRouting, Routing

CPU = Cpu(
    name="cpu",
    cores=2,
    physical_cores=2,
    kernel="avx2",
    threads=2,
    pinned=False,
    threads_us={1: 90.0, 2: 80.0},
    pinned_threads_us={1: 90.0, 2: 80.0},
)
LINK = Link(
    generation=4,
    width=16,
    h2d_bytes_per_s=1e9,
    h2d_pageable_bytes_per_s=2e8,
    d2h_bytes_per_s=1e9,
    round_trip_us=20.0,
)
PAIRS = {count: list(combinations(range(count), 2)) for count in range(1, 9)}


def small_model(**overrides) -> ModelSpec:
    """Two layers of four experts, each of 128 neurons in four blocks.

    Overrides use the keys of config.json or of ModelShape.
    """
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


def few_layers(folder: Path, layers: int) -> str:
    """Writes a model folder with Mixtral's config cut to `layers` layers; returns its name."""
    folder.mkdir()
    config = {**ModelSpec.load(DEFAULT_MODEL).config.raw, "num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def machine_profile(
    model: ModelSpec,
    device: float = 10.0,
    host: float = 80.0,
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
    """A machine profiled on `model`'s own shape; times are in microseconds.

    They are flat up to 8 tokens, then proportional to tokens. `host`: an expert in host memory at
    the best `share`. `cpu`: the CPU alone (None: 1% more than `host`). `dense_device`: the
    device's part of `dense` (None: all of it).
    """

    def flat(microseconds: float) -> dict[int, float]:
        return {1: microseconds, 8: microseconds}

    on_gpu = kind == "cuda"
    by_share = {0.0: cpu or host * 1.01, share: host, 1.0: host * 1.5} if on_gpu else {0.0: host}
    return MachineProfile(
        version=5,
        source="measured",
        cpu=CPU,
        memory=Memory(available_bytes=10**9, timed_bytes=10**8, memlock_bytes=None),
        device=Device(
            kind=kind,
            name="device",
            memory_bytes=memory_bytes,
            free_bytes=memory_bytes,
            context_bytes=context_bytes,
        ),
        link=LINK if on_gpu else None,
        disk_bytes_per_s=disk_bytes_per_s,
        shape=MeasuredShape.of(model),
        kernels=KernelLimits(
            decode_tokens=256, token_blocks=2048, decoded_blocks=8, memory_bound_tokens=16
        ),
        host_expert_us={1: by_share, 8: by_share},
        resident_expert_us=flat(device),
        dense_layer_us=flat(dense),
        dense_device_us=flat(dense if dense_device is None else dense_device),
        head_us=flat(head),
        provenance=ProfileProvenance(command="by hand", created="2026-01-01", software="none"),
    )


def several_ranks(
    *ranks: MachineProfile, round_trip_us: float = 20.0, bytes_per_s: float = 1e9
) -> MachineProfile:
    """The profile of ranks on a machine each."""
    network = Network(round_trip_us=round_trip_us, bytes_per_s=bytes_per_s)
    return joined(ranks, [f"{number}.yaml" for number in range(len(ranks))], network)


def random_routing(model: ModelSpec, rng: random.Random) -> Routing:
    """Skewed random pair probabilities, some of them zero, and the experts' that follow."""
    experts = model.shape.num_experts
    top_k = model.shape.num_experts_per_tok
    expert = []
    pair = []
    for _ in range(model.shape.num_layers):
        weights = [rng.choice([0.0, 1.0, 1.0]) * rng.random() ** 3 for _ in PAIRS[experts]]
        weights[0] += 0.01
        chances = {p: w / sum(weights) for p, w in zip(PAIRS[experts], weights, strict=True)}
        pair.append(chances)
        expert.append(
            [sum(c for p, c in chances.items() if e in p) * top_k / 2 for e in range(experts)]
        )
    return routed("random", expert, pair)


def routed(
    origin: str, expert: list[list[float]], pair: list[dict[tuple[int, int], float]]
) -> Routing:
    """The same routing in prefill and decode."""
    phase = PhaseRouting(expert, pair)
    return Routing(origin, phase, phase)


def random_machine(rng: random.Random) -> MachineProfile:
    """A random roofline with overhead and noise, whose experts take milliseconds.

    On some machines, host memory limits CPU and link together.
    """
    model = small_model()
    alone = rng.uniform(2e3, 8e3)
    copy = rng.uniform(1e3, 2e4)
    on_device = rng.uniform(20, 200)
    memory = rng.choice([0.0, rng.uniform(0.5, 1.0)]) * alone
    arithmetic = alone / rng.uniform(5, 100)
    host = {}
    device = {}
    for tokens in (1, 2, 8, 32, 128, 512):
        cpu = max(alone, arithmetic * tokens)
        gpu = on_device * max(1, tokens / 64)
        link = max(copy, gpu, memory)
        best = max(memory, cpu * link / (cpu + link)) * rng.uniform(1, 1.2)
        share = round(cpu / (cpu + link), 2)
        host[tokens] = {1.0: link, share: best, 0.0: cpu, round(share / 2, 3): best * 1.1}
        host[tokens] = {share: us * rng.uniform(0.97, 1.03) for share, us in host[tokens].items()}
        if tokens == 512:
            del host[tokens][rng.choice([0.0, 1.0])]
        device[tokens] = gpu
    machine = machine_profile(model, dense=150.0)
    link = machine.link.model_copy(update={"h2d_bytes_per_s": model.expert_bytes / copy * 1e6})
    return machine.model_copy(
        update={"host_expert_us": host, "resident_expert_us": device, "link": link}
    )
