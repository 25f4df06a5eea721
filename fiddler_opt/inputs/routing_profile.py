"""RoutingProfile: how often a model's router chose each expert on sets of prompts.

It also counts how often the router chose each pair of experts, and the same expert for consecutive
tokens.
"""

from itertools import combinations
from math import comb
from typing import ClassVar, Literal

from fiddler_run.plan.yaml_file import (
    Count,
    CountOrZero,
    ExpertCount,
    LayerCount,
    Section,
    YamlFile,
)

Rows = dict[CountOrZero, list[CountOrZero]]  # by layer


class RoutedModel(Section):
    name: str
    num_layers: LayerCount
    num_experts: ExpertCount
    num_experts_per_tok: ExpertCount

    def problems(self) -> list[str]:
        chosen = self.num_experts_per_tok
        experts = self.num_experts
        return (
            []
            if chosen <= experts
            else [f"model.num_experts_per_tok: {chosen} of {experts} experts"]
        )


class Recorded(Section):
    """How the profile was made.

    `output_tokens` is the requested number per prompt. An end token or the end of the context may
    have ended a generation earlier.
    """

    command: str
    created: str
    output_tokens: Count


class Counts(Section):
    """Counts of routed tokens.

    `tokens` passed the router of every layer. `followers` of them follow another token of their
    sequence; the first token of decode follows the last token of its prompt.

    `activations[layer][expert]` counts the tokens that chose the expert. `pairs[layer][pair]`
    counts the pairs (0,1), (0,2) ... (1,2) ...; it is empty unless each token chooses two experts.
    `reuse[layer][expert]` counts the tokens that chose the same expert as the token before them.
    """

    tokens: CountOrZero
    followers: CountOrZero
    activations: Rows
    pairs: Rows
    reuse: Rows


class PromptSet(Section):
    """The counts of one set of prompts.

    `prefill` counts the tokens of the prompts. `decode` counts generated tokens; the last one of
    each prompt is never routed.
    """

    prompts: Count
    prefill: Counts
    decode: Counts


class RoutingProfile(YamlFile):
    kind: ClassVar[str] = "routing profile"
    made_by: ClassVar[str] = "fiddler-opt profile --only routing"

    version: Literal[2]
    model: RoutedModel
    recorded: Recorded
    sets: dict[str, PromptSet]

    header: ClassVar[str] = (
        "Counts by set of prompts, for prompt tokens (prefill) and generated tokens (decode).\n"
        "  tokens: tokens that passed the routers; followers: those with a token before them\n"
        "  activations: by layer, for each expert, the tokens that chose it\n"
        "  pairs: by layer, for each pair (0,1), (0,2) ... (1,2) ..., the tokens that chose both;"
        " empty unless each token chooses two\n"
        "  reuse: by layer, for each expert, the tokens that chose it like the token before them"
    )

    def problems(self) -> list[str]:
        problems = [] if self.sets else ["sets: needs at least one set of prompts"]
        for name, part in self.sets.items():
            where = f"sets.{name}"
            prefill = part.prefill.tokens
            decode = part.decode.tokens
            most = part.prompts * (self.recorded.output_tokens - 1)
            if prefill < part.prompts:
                problems.append(
                    f"{where}.prefill.tokens: {prefill} for {part.prompts} prompts; each has at"
                    " least one"
                )
            if decode > most:
                problems.append(
                    f"{where}.decode.tokens: {decode}, at most {most} follow from"
                    " recorded.output_tokens"
                )
            problems += _problems(
                part.prefill, self.model, prefill - part.prompts, f"{where}.prefill"
            )
            problems += _problems(part.decode, self.model, decode, f"{where}.decode")
        return problems


def _problems(counts: Counts, model: RoutedModel, followers: int, where: str) -> list[str]:
    """The problems of `counts`. Rows are compared only if their lengths are right."""
    problems = []
    if counts.followers != followers:
        problems.append(
            f"{where}.followers: {counts.followers}, expected {followers} of {counts.tokens} tokens"
        )
    misshapen = _shape_problem(counts, model, where)
    if misshapen is not None:
        return [*problems, misshapen]
    for layer in range(model.num_layers):
        problems += _layer_problems(counts, model.num_experts_per_tok, layer, followers, where)
    return problems


def _shape_problem(counts: Counts, model: RoutedModel, where: str) -> str | None:
    """The first row that is missing or has the wrong length."""
    experts = model.num_experts
    lengths = {"activations": experts, "reuse": experts}
    if model.num_experts_per_tok == 2:
        lengths["pairs"] = comb(experts, 2)
    elif counts.pairs:
        return f"{where}.pairs: must be empty where a token does not choose two experts"
    for key, length in lengths.items():
        rows = getattr(counts, key)
        if sorted(rows) != list(range(model.num_layers)):
            return f"{where}.{key}: needs exactly the layers 0 to {model.num_layers - 1}"
        for layer, row in rows.items():
            if len(row) != length:
                return f"{where}.{key}[{layer}]: {len(row)} numbers, expected {length}"
    return None


def _layer_problems(
    counts: Counts, top_k: int, layer: int, followers: int, where: str
) -> list[str]:
    tokens = counts.tokens
    activations = counts.activations[layer]
    problems = []
    if sum(activations) != tokens * top_k:
        problems.append(
            f"{where}.activations[{layer}]: adds up to {sum(activations)}, expected"
            f" {tokens * top_k} for {tokens} tokens"
        )
    for expert, (chosen, again) in enumerate(zip(activations, counts.reuse[layer], strict=True)):
        if chosen > tokens:
            problems.append(f"{where}.activations[{layer}][{expert}]: {chosen} of {tokens} tokens")
        if again > min(chosen, followers):
            problems.append(
                f"{where}.reuse[{layer}][{expert}]: {again} of {chosen} choices and {followers}"
                " followers"
            )
    if top_k == 2:
        problems += _pair_problems(counts.pairs[layer], activations, tokens, layer, where)
    return problems


def _pair_problems(
    pairs: list[int], activations: list[int], tokens: int, layer: int, where: str
) -> list[str]:
    """The pair counts of a layer that contradict its activations."""
    key = f"{where}.pairs[{layer}]"
    problems = []
    if sum(pairs) != tokens:
        problems.append(f"{key}: adds up to {sum(pairs)}, expected {tokens} for {tokens} tokens")
    holding = [0] * len(activations)  # by expert, the pairs that contain it
    for both, count in zip(combinations(range(len(activations)), 2), pairs, strict=True):
        for expert in both:
            holding[expert] += count
    return problems + [
        f"{key}: {held} hold expert {expert}, expected {chosen} for {chosen} choices of it"
        for expert, (held, chosen) in enumerate(zip(holding, activations, strict=True))
        if held != chosen
    ]
