"""RoutingProfile: how often a model's router chose each expert, each pair, and the same expert again, on sets of prompts."""

from collections.abc import Collection
from dataclasses import dataclass, field
from itertools import combinations
from math import comb
from typing import ClassVar, Literal, Self

from pydantic import NonNegativeInt, PositiveInt, model_validator

from fiddler_opt.model import ModelSpec
from fiddler_run.errors import FiddlerError
from fiddler_run.yaml_file import Section, YamlFile

Rows = dict[NonNegativeInt, list[NonNegativeInt]]  # per layer


class RoutedModel(Section):
    name: str
    num_layers: PositiveInt
    num_experts: PositiveInt
    num_experts_per_tok: PositiveInt


class Recorded(Section):
    """`output_tokens` were asked for per prompt; an end of text or the context may have ended it earlier."""

    command: str
    created: str
    output_tokens: PositiveInt


class Counts(Section):
    """`tokens` passed the router of every layer; `followers` of them come after another token of their sequence.

    A decode's first token follows its prompt's last. Rows: `activations[layer][expert]`, `pairs[layer][pair]` with the pairs
    (0,1), (0,2) ... (1,2) ..., and `reuse[layer][expert]`: tokens that chose an expert which the token before them chose too.
    """

    tokens: NonNegativeInt
    followers: NonNegativeInt
    activations: Rows
    pairs: Rows
    reuse: Rows


class PromptSet(Section):
    """`prefill` counts the prompts' tokens, `decode` those that were generated and routed: the last of each prompt is not."""

    prompts: PositiveInt
    prefill: Counts
    decode: Counts


class RoutingProfile(YamlFile):
    version: Literal[2]
    model: RoutedModel
    recorded: Recorded
    sets: dict[str, PromptSet]

    header: ClassVar[str] = (
        "Written by `fiddler-opt profile`. For each set, the prompts' tokens (prefill) apart from those generated (decode):\n"
        "  tokens: passed the router of every layer; followers: tokens that come after another of their sequence\n"
        "  activations: per layer, for each expert: tokens that chose it\n"
        "  pairs: per layer, for each pair of experts (0,1), (0,2) ... (1,2) ...: tokens that chose both\n"
        "  reuse: per layer, for each expert: tokens that chose it, as the token before them did"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.sets:
            raise ValueError("sets: needs at least one set of prompts")
        for name, part in self.sets.items():
            where = f"sets.{name}"
            prefill, decode, most = part.prefill.tokens, part.decode.tokens, part.prompts * (self.recorded.output_tokens - 1)
            if prefill < part.prompts:
                raise ValueError(f"{where}.prefill.tokens: {prefill} for {part.prompts} prompts; each has at least one")
            if decode > most:
                raise ValueError(f"{where}.decode.tokens: {decode}, at most {most} follow from recorded.output_tokens")
            _check(part.prefill, self.model, prefill - part.prompts, f"{where}.prefill")
            _check(part.decode, self.model, decode, f"{where}.decode")
        return self


def _check(counts: Counts, model: RoutedModel, followers: int, where: str) -> None:
    """
    Raises:
        ValueError: the counts do not add up; the message names the key.
    """
    experts, top_k, tokens = model.num_experts, model.num_experts_per_tok, counts.tokens
    if counts.followers != followers:
        raise ValueError(f"{where}.followers: {counts.followers}, expected {followers} of {tokens} tokens")
    totals = {"activations": tokens * top_k, "pairs": tokens * comb(top_k, 2)}
    for key, length in {"activations": experts, "pairs": comb(experts, 2), "reuse": experts}.items():
        rows = getattr(counts, key)
        if sorted(rows) != list(range(model.num_layers)):
            raise ValueError(f"{where}.{key}: needs exactly the layers 0 to {model.num_layers - 1}")
        for layer, row in rows.items():
            if len(row) != length:
                raise ValueError(f"{where}.{key}[{layer}]: {len(row)} numbers, expected {length}")
            if key in totals and sum(row) != totals[key]:
                raise ValueError(f"{where}.{key}[{layer}]: adds up to {sum(row)}, expected {totals[key]} for {tokens} tokens")
    for layer, row in counts.reuse.items():
        for expert, (again, chosen) in enumerate(zip(row, counts.activations[layer], strict=True)):
            if again > min(chosen, followers):
                raise ValueError(f"{where}.reuse[{layer}][{expert}]: {again} of {chosen} choices and {followers} followers")


@dataclass(frozen=True)
class PhaseRouting:
    """Probabilities per layer that one token chooses expert e (`expert`), or experts (e, f) both (`pair`, e < f)."""

    expert: list[list[float]]
    pair: list[dict[tuple[int, int], float]]


@dataclass(frozen=True)
class Routing:
    """How tokens of each phase are routed. `origin` is a file, or "uniform (assumed)".

    `sets`: the same for each set of prompts by itself, by name, if there are several.
    """

    origin: str
    prefill: PhaseRouting
    decode: PhaseRouting
    sets: dict[str, "Routing"] = field(default_factory=dict)

    @classmethod
    def uniform(cls, model: ModelSpec) -> "Routing":
        shape = model.shape
        expert = [shape.num_experts_per_tok / shape.num_experts] * shape.num_experts
        chance = comb(shape.num_experts_per_tok, 2) / max(1, comb(shape.num_experts, 2))
        pair = dict.fromkeys(combinations(range(shape.num_experts), 2), chance)
        phase = PhaseRouting([expert] * shape.num_layers, [pair] * shape.num_layers)
        return cls("uniform (assumed)", phase, phase)

    @classmethod
    def from_profile(cls, profile: RoutingProfile, model: ModelSpec, origin: str, sets: Collection[str] | None = None) -> "Routing":
        """Frequencies over all prompts of the named sets (None: of every set). Without a decode token, decode is prefill.

        Raises:
            FiddlerError: the profile is of a model with other layers or experts, or has no such set.
        """
        for key in ("num_layers", "num_experts", "num_experts_per_tok"):
            recorded, needed = getattr(profile.model, key), getattr(model.shape, key)
            if recorded != needed:
                raise FiddlerError(
                    f"{origin}: model.{key} is {recorded}, but {model.shape.name} has {needed}: a profile of another model; "
                    "record one with `fiddler-opt profile --model ... --prompts ...`"
                )
        chosen = list(profile.sets) if sets is None else sets
        for name in chosen:
            if name not in profile.sets:
                raise FiddlerError(f"{origin}: no set of prompts is named {name}; it has {', '.join(profile.sets)}")
        parts = [part for name, part in profile.sets.items() if name in chosen]  # each once, however often it is named
        prefill = _frequencies([part.prefill for part in parts], profile.model)
        decoded = any(part.decode.tokens for part in parts)
        decode = _frequencies([part.decode for part in parts], profile.model) if decoded else prefill
        several = chosen if len(parts) > 1 else []
        return cls(origin, prefill, decode, {name: cls.from_profile(profile, model, origin, [name]) for name in several})


def _frequencies(parts: list[Counts], model: RoutedModel) -> PhaseRouting:
    tokens = sum(part.tokens for part in parts)
    pairs = list(combinations(range(model.num_experts), 2))

    def chances(key: str, layer: int) -> list[float]:
        return [sum(counts) / tokens for counts in zip(*(getattr(part, key)[layer] for part in parts), strict=True)]

    return PhaseRouting(
        expert=[chances("activations", layer) for layer in range(model.num_layers)],
        pair=[dict(zip(pairs, chances("pairs", layer), strict=True)) for layer in range(model.num_layers)],
    )
