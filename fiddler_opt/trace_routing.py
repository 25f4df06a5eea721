"""Records a RoutingProfile: runs prompts through a model and counts what its routers choose."""

import json
from collections.abc import Callable
from datetime import date
from itertools import combinations
from pathlib import Path

import torch

from fiddler_opt.routing import Recorded, RoutedModel, RoutingProfile
from fiddler_run.errors import FiddlerError
from fiddler_run.plan import ModelShape
from fiddler_run.yaml_file import read_text

PROMPT_KEYS = ("prompt", "text")


class RouterCounter:
    """Counts choices per layer by a hook before each experts module, whose arguments every Mixtral-style model shares."""

    def __init__(self, experts_modules: list[torch.nn.Module], num_experts: int):
        self.num_experts = num_experts
        self.activations = torch.zeros((len(experts_modules), num_experts), dtype=torch.long)
        self.pairs = torch.zeros((len(experts_modules), num_experts, num_experts), dtype=torch.long)
        self._hooks = [
            module.register_forward_pre_hook(lambda _, arguments, layer=layer: self._count(layer, arguments[1]))
            for layer, module in enumerate(experts_modules)
        ]

    def _count(self, layer: int, top_k_index: torch.Tensor) -> None:
        chosen = torch.nn.functional.one_hot(top_k_index.cpu(), self.num_experts).sum(dim=1)  # [tokens, experts]
        self.activations[layer] += chosen.sum(dim=0)
        self.pairs[layer] += chosen.T @ chosen  # the diagonal repeats the activations and is not read

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()


def encode_prompts(tokenizer, prompts: list[str], context: int, origin: str) -> list[torch.Tensor]:
    """Token ids [1, n] of each prompt by itself, so that there is no padding to count; `origin` names the prompts in messages.

    Raises:
        FiddlerError: a prompt is longer than the model's `context`.
    """
    encoded = [tokenizer(prompt, return_tensors="pt")["input_ids"] for prompt in prompts]
    for number, ids in enumerate(encoded, 1):
        if ids.shape[1] > context:
            raise FiddlerError(
                f"{origin}: prompt {number} has {ids.shape[1]} tokens, more than the model's context of {context}; shorten it"
            )
    return encoded


@torch.inference_mode()
def record_routing(
    model, shape: ModelShape, encoded: list[torch.Tensor], origin: str, command: str, on_prompt: Callable[[], None]
) -> RoutingProfile:
    """Runs each of `encode_prompts`' prompts through the model; calls `on_prompt` after each."""
    counter = RouterCounter(model.experts_modules(), shape.num_experts)
    try:
        for ids in encoded:
            model(ids.to(model.device), logits_to_keep=1)
            on_prompt()
    finally:
        counter.close()
    tokens = sum(ids.shape[1] for ids in encoded)
    pairs = list(combinations(range(shape.num_experts), 2))
    return RoutingProfile(
        version=1,
        model=RoutedModel(
            name=Path(shape.name).name,
            num_layers=shape.num_layers,
            num_experts=shape.num_experts,
            num_experts_per_tok=shape.num_experts_per_tok,
        ),
        recorded=Recorded(
            prompts=origin, num_prompts=len(encoded), tokens=tokens, command=command, created=date.today().isoformat()
        ),
        activations={layer: row.tolist() for layer, row in enumerate(counter.activations)},
        pairs={layer: [int(matrix[e, f]) for e, f in pairs] for layer, matrix in enumerate(counter.pairs)},
    )


def read_prompts(path: Path) -> list[str]:
    """Prompts of a file: one a line, or in a `.jsonl` file one JSON string or object with "prompt" or "text" a line.

    Raises:
        FiddlerError: the file cannot be read, a line is malformed, or there is no prompt in it.
    """
    lines = read_text(path).splitlines()
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if path.suffix == ".jsonl":
        prompts = [_json_prompt(line, f"{path}:{number}") for number, line in numbered]
    else:
        prompts = [line for _, line in numbered]
    if not prompts:
        raise FiddlerError(f"{path}: holds no prompt; write one a line")
    return prompts


def _json_prompt(line: str, where: str) -> str:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise FiddlerError(f"{where}: not JSON: {error}") from None
    texts = [entry] if isinstance(entry, str) else [entry.get(key) for key in PROMPT_KEYS] if isinstance(entry, dict) else []
    text = next((text for text in texts if isinstance(text, str) and text.strip()), None)
    if text is None:
        raise FiddlerError(f'{where}: no text; write a JSON string, or an object with "prompt" or "text"')
    return text
