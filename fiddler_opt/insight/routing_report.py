"""Prints a routing profile in the terminal."""

from rich.console import Console

from fiddler_opt.inputs.routing_profile import PromptSet, RoutingProfile
from fiddler_opt.insight.table import table


def print_routing(console: Console, routing: RoutingProfile) -> None:
    """Prints the sets of prompts and the busiest experts of each layer."""
    model = routing.model
    top = max(1, model.num_experts // 4)
    sets = table("prompts", "number", "prompt tokens", "generated", "expert reuse")
    for name, part in routing.sets.items():
        sets.add_row(
            name,
            str(part.prompts),
            str(part.prefill.tokens),
            str(part.decode.tokens),
            _reuse(part, model.num_experts_per_tok),
        )
    console.print(sets)
    busiest = table("layer", "busiest experts in prefill (share of choices)", "in decode")
    phases = [merged_activations(routing, phase) for phase in ("prefill", "decode")]
    for layer in range(model.num_layers):
        row = []
        for activations in phases:
            counts = activations[layer]
            order = sorted(range(len(counts)), key=lambda e: -counts[e])[:top]
            row.append(
                ", ".join(f"{e} ({counts[e] / sum(counts):.0%})" for e in order)
                if sum(counts)
                else "-"
            )
        busiest.add_row(str(layer), *row)
    console.print(busiest)
    console.print(
        f"uniform routing: {1 / model.num_experts:.3g} of the choices for each expert, expert"
        f" reuse {model.num_experts_per_tok / model.num_experts:.0%}"
    )


def merged_activations(routing: RoutingProfile, phase: str) -> list[list[int]]:
    """Choices of each expert by layer, over all sets, in `prefill` or `decode`."""
    parts = [getattr(part, phase).activations for part in routing.sets.values()]
    return [
        [sum(counts) for counts in zip(*(part[layer] for part in parts), strict=True)]
        for layer in range(routing.model.num_layers)
    ]


def _reuse(part: PromptSet, top_k: int) -> str:
    """By phase, the fraction of choices that the previous token made too."""
    phases = {"prefill": part.prefill, "decode": part.decode}
    shares = {
        name: sum(map(sum, counts.reuse.values())) / (counts.followers * top_k * len(counts.reuse))
        for name, counts in phases.items()
        if counts.followers
    }
    return ", ".join(f"{name} {share:.0%}" for name, share in shares.items()) or "-"
