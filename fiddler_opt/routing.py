"""RoutingProfile: how often a model's router chose each expert, each pair, and the same expert again, on sets of prompts."""

from collections.abc import Collection
from dataclasses import dataclass, field
from itertools import combinations
from math import comb
from typing import ClassVar, Literal

from fiddler_opt.model import ModelSpec
from fiddler_run.errors import FiddlerError
from fiddler_run.plan import ModelShape
from fiddler_run.yaml_file import Count, CountOrZero, ExpertCount, LayerCount, Section, YamlFile

Rows = dict[CountOrZero, list[CountOrZero]]  # per layer
MAX_PAIRS = 8_000  # of all layers together, each a case of its own to the solver; beyond this it takes minutes


class RoutedModel(Section):
    name: str
    num_layers: LayerCount
    num_experts: ExpertCount
    num_experts_per_tok: ExpertCount

    def problems(self) -> list[str]:
        chosen, experts = self.num_experts_per_tok, self.num_experts
        return [] if chosen <= experts else [f"model.num_experts_per_tok: {chosen} of {experts} experts"]


class Recorded(Section):
    """`output_tokens` were asked for per prompt; an end of text or the context may have ended it earlier."""

    command: str
    created: str
    output_tokens: Count


class Counts(Section):
    """`tokens` passed the router of every layer; `followers` of them come after another token of their sequence.

    A decode's first token follows its prompt's last. Rows: `activations[layer][expert]`, `pairs[layer][pair]` with the pairs
    (0,1), (0,2) ... (1,2) ..., and `reuse[layer][expert]`: tokens that chose an expert which the token before them chose too.
    """

    tokens: CountOrZero
    followers: CountOrZero
    activations: Rows
    pairs: Rows
    reuse: Rows


class PromptSet(Section):
    """`prefill` counts the prompts' tokens, `decode` those that were generated and routed: the last of each prompt is not."""

    prompts: Count
    prefill: Counts
    decode: Counts


class RoutingProfile(YamlFile):
    kind: ClassVar[str] = "routing profile"

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

    def problems(self) -> list[str]:
        problems = [] if self.sets else ["sets: needs at least one set of prompts"]
        for name, part in self.sets.items():
            where = f"sets.{name}"
            prefill, decode = part.prefill.tokens, part.decode.tokens
            most = part.prompts * (self.recorded.output_tokens - 1)
            if prefill < part.prompts:
                problems.append(f"{where}.prefill.tokens: {prefill} for {part.prompts} prompts; each has at least one")
            if decode > most:
                problems.append(f"{where}.decode.tokens: {decode}, at most {most} follow from recorded.output_tokens")
            problems += _problems(part.prefill, self.model, prefill - part.prompts, f"{where}.prefill")
            problems += _problems(part.decode, self.model, decode, f"{where}.decode")
        return problems


def _problems(counts: Counts, model: RoutedModel, followers: int, where: str) -> list[str]:
    """What keeps the counts from adding up. Rows are compared only where their lengths are right."""
    experts, tokens = model.num_experts, counts.tokens
    problems = []
    if counts.followers != followers:
        problems.append(f"{where}.followers: {counts.followers}, expected {followers} of {tokens} tokens")
    lengths = {"activations": experts, "pairs": comb(experts, 2), "reuse": experts}
    for key, length in lengths.items():
        rows = getattr(counts, key)
        if sorted(rows) != list(range(model.num_layers)):
            return [*problems, f"{where}.{key}: needs exactly the layers 0 to {model.num_layers - 1}"]
        for layer, row in rows.items():
            if len(row) != length:
                return [*problems, f"{where}.{key}[{layer}]: {len(row)} numbers, expected {length}"]
    for layer in range(model.num_layers):
        problems += _layer_problems(counts, model.num_experts_per_tok, layer, followers, where)
    return problems


def _layer_problems(counts: Counts, top_k: int, layer: int, followers: int, where: str) -> list[str]:
    tokens, activations, pairs = counts.tokens, counts.activations[layer], counts.pairs[layer]
    problems = [
        f"{where}.{key}[{layer}]: adds up to {sum(row)}, expected {total} for {tokens} tokens"
        for key, row, total in (
            ("activations", activations, tokens * top_k),
            ("pairs", pairs, tokens * comb(top_k, 2)),
        )
        if sum(row) != total
    ]
    with_others = [0] * len(activations)  # pairs that hold each expert
    for (first, second), count in zip(combinations(range(len(activations)), 2), pairs, strict=True):
        with_others[first] += count
        with_others[second] += count
    for expert, (chosen, again) in enumerate(zip(activations, counts.reuse[layer], strict=True)):
        if chosen > tokens:
            problems.append(f"{where}.activations[{layer}][{expert}]: {chosen} of {tokens} tokens")
        if with_others[expert] != chosen * (top_k - 1):
            problems.append(
                f"{where}.pairs[{layer}]: {with_others[expert]} hold expert {expert}, "
                f"expected {chosen * (top_k - 1)} for {chosen} choices of it"
            )
        if again > min(chosen, followers):
            problems.append(f"{where}.reuse[{layer}][{expert}]: {again} of {chosen} choices and {followers} followers")
    return problems


@dataclass(frozen=True)
class PhaseRouting:
    """Probabilities per layer that one token chooses expert e (`expert`), or experts (e, f) both (`pair`, e < f).

    `pair` holds none where a token does not choose two experts, or there are more pairs than MAX_PAIRS.
    """

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
        pairs = _pairs(shape)
        pair = dict.fromkeys(pairs, 1 / max(1, len(pairs)))
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
    pairs = _pairs(model)

    def chances(key: str, layer: int) -> list[float]:
        return [sum(counts) / tokens for counts in zip(*(getattr(part, key)[layer] for part in parts), strict=True)]

    return PhaseRouting(
        expert=[chances("activations", layer) for layer in range(model.num_layers)],
        pair=[dict(zip(pairs, chances("pairs", layer), strict=True)) if pairs else {} for layer in range(model.num_layers)],
    )


def _pairs(model: RoutedModel | ModelShape) -> list[tuple[int, int]]:
    """The pairs of experts that a token can choose, in the order of a profile's rows; none if too many."""
    several = model.num_layers * comb(model.num_experts, 2) > MAX_PAIRS
    if model.num_experts_per_tok != 2 or several:
        return []
    return list(combinations(range(model.num_experts), 2))
