"""Small models, machines and routings for the planner's tests."""

import random
from itertools import combinations

from fiddler_opt.machine import Cpu, Device, MachineProfile, Made, MeasuredShape
from fiddler_opt.model import ModelSpec
from fiddler_opt.routing import Routing

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
    dispatch: float = 1.0,
    dense: float = 1.0,
    head: float = 1.0,
    kind: str = "cuda",
    memory_bytes: int = 10**9,
    context_bytes: int = 0,
) -> MachineProfile:
    """Microseconds of a machine on `model`'s own shape: flat in tokens up to 8, then in proportion to them."""

    def flat(microseconds: float) -> dict[int, float]:
        return {1: microseconds, 8: microseconds}

    return MachineProfile(
        version=1,
        source="measured",
        cpu=Cpu(name="cpu", cores=2, threads=2),
        device=Device(kind=kind, name="device", memory_bytes=memory_bytes, context_bytes=context_bytes),
        shape=MeasuredShape.of(model),
        h2d_bytes_per_s=1e9 if kind == "cuda" else None,
        cpu_expert_us=flat(absent),
        device_expert_us=flat(device),
        absent_expert_us=flat(absent),
        stream_share={1: 0.25} if kind == "cuda" else {1: 0.0},
        dispatch_us=flat(dispatch),
        dense_layer_us=flat(dense),
        head_us=flat(head),
        provenance=Made(command="by hand", created="2026-01-01", software="none"),
    )


def random_routing(model: ModelSpec, rng: random.Random) -> Routing:
    """Skewed choices: pair probabilities drawn at random, some zero, and the experts' that follow from them."""
    experts = model.shape.num_experts
    expert, pair = [], []
    for _ in range(model.shape.num_layers):
        weights = [rng.choice([0.0, 1.0, 1.0]) * rng.random() ** 3 for _ in PAIRS[experts]]
        weights[0] += 0.01
        chances = {p: w / sum(weights) for p, w in zip(PAIRS[experts], weights, strict=True)}
        pair.append(chances)
        expert.append([sum(c for p, c in chances.items() if e in p) for e in range(experts)])
    return Routing("random", expert, pair)
