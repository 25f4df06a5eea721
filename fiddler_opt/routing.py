"""RoutingProfile: how often a model's router chose each expert, and each pair of experts, on recorded prompts."""

from dataclasses import dataclass
from itertools import combinations
from math import comb
from typing import ClassVar, Literal, Self

from pydantic import NonNegativeInt, PositiveInt, model_validator

from fiddler_opt.model import ModelSpec
from fiddler_run.errors import FiddlerError
from fiddler_run.yaml_file import Section, YamlFile


class RoutedModel(Section):
    name: str
    num_layers: PositiveInt
    num_experts: PositiveInt
    num_experts_per_tok: PositiveInt


class Recorded(Section):
    """`tokens` passed the router of every layer."""

    prompts: str
    num_prompts: PositiveInt
    tokens: PositiveInt
    command: str
    created: str


class RoutingProfile(YamlFile):
    version: Literal[1]
    model: RoutedModel
    recorded: Recorded
    activations: dict[NonNegativeInt, list[NonNegativeInt]]
    pairs: dict[NonNegativeInt, list[NonNegativeInt]]

    header: ClassVar[str] = "Written by `fiddler-opt profile`."
    key_comments: ClassVar[dict[str, str]] = {
        "activations": "per layer, for each expert: tokens that chose it",
        "pairs": "per layer, for each pair of experts (0,1), (0,2) ... (1,2) ...: tokens that chose both",
    }

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        model, tokens = self.model, self.recorded.tokens
        top_k, experts = model.num_experts_per_tok, model.num_experts
        expected = {"activations": (experts, tokens * top_k), "pairs": (comb(experts, 2), tokens * comb(top_k, 2))}
        for key, (length, total) in expected.items():
            rows = getattr(self, key)
            if sorted(rows) != list(range(model.num_layers)):
                raise ValueError(f"{key}: needs exactly the layers 0 to {model.num_layers - 1}")
            for layer, row in rows.items():
                if len(row) != length:
                    raise ValueError(f"{key}[{layer}]: {len(row)} numbers, expected {length}")
                if sum(row) != total:
                    raise ValueError(f"{key}[{layer}]: adds up to {sum(row)}, expected {total} for {tokens} tokens")
        return self


@dataclass(frozen=True)
class Routing:
    """Probabilities per layer that one token chooses expert e (`expert`), or experts (e, f) both (`pair`, e < f)."""

    origin: str
    expert: list[list[float]]
    pair: list[dict[tuple[int, int], float]]

    @classmethod
    def uniform(cls, model: ModelSpec) -> "Routing":
        shape = model.shape
        expert = [shape.num_experts_per_tok / shape.num_experts] * shape.num_experts
        chance = comb(shape.num_experts_per_tok, 2) / max(1, comb(shape.num_experts, 2))
        pair = dict.fromkeys(combinations(range(shape.num_experts), 2), chance)
        return cls("uniform (assumed)", [expert] * shape.num_layers, [pair] * shape.num_layers)

    @classmethod
    def from_profile(cls, profile: RoutingProfile, model: ModelSpec, origin: str) -> "Routing":
        """
        Raises:
            FiddlerError: the profile is of a model with other layers or experts.
        """
        for key in ("num_layers", "num_experts", "num_experts_per_tok"):
            recorded, needed = getattr(profile.model, key), getattr(model.shape, key)
            if recorded != needed:
                raise FiddlerError(
                    f"{origin}: model.{key} is {recorded}, but {model.shape.name} has {needed}: a profile of another model; "
                    "record one with `fiddler-opt profile --model ... --prompts ...`"
                )
        tokens = profile.recorded.tokens
        layers = range(model.shape.num_layers)
        pairs = list(combinations(range(model.shape.num_experts), 2))
        return cls(
            origin=origin,
            expert=[[count / tokens for count in profile.activations[layer]] for layer in layers],
            pair=[{pair: n / tokens for pair, n in zip(pairs, profile.pairs[layer], strict=True)} for layer in layers],
        )
