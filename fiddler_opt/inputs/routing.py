"""Routing: the probabilities with which tokens choose experts, recorded or assumed."""

from collections.abc import Collection
from dataclasses import dataclass, field
from itertools import combinations
from math import comb

from fiddler_opt.inputs.model import ModelSpec
from fiddler_opt.inputs.routing_profile import Counts, RoutedModel, RoutingProfile
from fiddler_run.errors import FiddlerError
from fiddler_run.plan.shape import ModelShape

# In all layers together. Each pair is a scenario of the solver; beyond this it takes minutes.
MAX_PAIRS = 8_000
ASSUMED = "uniform (assumed)"  # the origin of a routing that no file describes


@dataclass(frozen=True)
class PhaseRouting:
    """Per layer, the probability that a token chooses expert e, or both of a pair e < f.

    `pair` is empty where a token does not choose two experts, or where there are more than
    MAX_PAIRS.
    """

    expert: list[list[float]]
    pair: list[dict[tuple[int, int], float]]


@dataclass(frozen=True)
class Routing:
    """How the tokens of each phase are routed. `origin` is a file or ASSUMED.

    `sets` holds the routing of each set of prompts by name, if there are several.
    """

    origin: str
    prefill: PhaseRouting
    decode: PhaseRouting
    sets: dict[str, "Routing"] = field(default_factory=dict)

    @classmethod
    def uniform(cls, model: ModelSpec) -> "Routing":
        shape = model.shape
        expert = [shape.num_experts_per_tok / shape.num_experts] * shape.num_experts
        pairs = _pairs(shape)
        pair = dict.fromkeys(pairs, 1 / max(1, len(pairs)))
        phase = PhaseRouting([expert] * shape.num_layers, [pair] * shape.num_layers)
        return cls(ASSUMED, phase, phase)

    @classmethod
    def from_profile(
        cls,
        profile: RoutingProfile,
        model: ModelSpec,
        origin: str,
        sets: Collection[str] | None = None,
    ) -> "Routing":
        """The frequencies over all prompts of the named sets. None: every set.

        Without any decode token, decode is assumed to be routed as prefill.

        Raises:
            FiddlerError: the profile's model has other layers or experts, or a set does not exist.
        """
        _require_same_model(profile.model, model.shape, origin)
        chosen = list(profile.sets) if sets is None else sets
        for name in chosen:
            if name not in profile.sets:
                raise FiddlerError(
                    f"{origin}: no set of prompts is named {name}; the sets are"
                    f" {', '.join(profile.sets)}"
                )
        # a set that is named twice counts once
        parts = {name: part for name, part in profile.sets.items() if name in chosen}
        prefill = _frequencies([part.prefill for part in parts.values()], profile.model)
        decode = prefill
        if any(part.decode.tokens for part in parts.values()):
            decode = _frequencies([part.decode for part in parts.values()], profile.model)
        several = parts if len(parts) > 1 else ()
        by_set = {name: cls.from_profile(profile, model, origin, [name]) for name in several}
        return cls(origin, prefill, decode, by_set)


def _require_same_model(recorded: RoutedModel, needed: ModelShape, origin: str) -> None:
    for key in ("num_layers", "num_experts", "num_experts_per_tok"):
        if getattr(recorded, key) != getattr(needed, key):
            raise FiddlerError(
                f"{origin}: model.{key} is {getattr(recorded, key)}, but {needed.name} has"
                f" {getattr(needed, key)}: a profile of another model; record one with `fiddler-opt"
                " profile --model ... --prompts ...`"
            )


def _frequencies(parts: list[Counts], model: RoutedModel) -> PhaseRouting:
    tokens = sum(part.tokens for part in parts)
    pairs = _pairs(model)

    def chances(key: str, layer: int) -> list[float]:
        return [
            sum(counts) / tokens
            for counts in zip(*(getattr(part, key)[layer] for part in parts), strict=True)
        ]

    return PhaseRouting(
        expert=[chances("activations", layer) for layer in range(model.num_layers)],
        pair=[
            dict(zip(pairs, chances("pairs", layer), strict=True)) if pairs else {}
            for layer in range(model.num_layers)
        ],
    )


def _pairs(model: RoutedModel | ModelShape) -> list[tuple[int, int]]:
    """The pairs of experts that a token can choose, in a profile's order. Empty if too many."""
    too_many = model.num_layers * comb(model.num_experts, 2) > MAX_PAIRS
    if model.num_experts_per_tok != 2 or too_many:
        return []
    return list(combinations(range(model.num_experts), 2))
