"""Chooses tokens: greedily, by beam search, or by sampling with a private random generator."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from fiddler_run.errors import FiddlerError
from fiddler_run.generation.model import PlannedModel

NO_NUMBERS = (
    "the model's logits are NaN; check its weights, and rms_norm_eps and RoPE in config.json"
)


@dataclass(frozen=True)
class Options:
    """How to generate. `temperature` 0 is greedy.

    `top_p` None takes the checkpoint's value, along with its other sampling parameters. `lookup`:
    see `LookupDecoding`; for one sequence, without beams.
    """

    max_new_tokens: int
    num_beams: int = 1
    temperature: float = 0.0
    top_p: float | None = None
    seed: int | None = None
    chat: bool = False
    lookup: bool = False


def sampling_arguments(
    model: PlannedModel, options: Options, first: Sequence[LogitsProcessor] = ()
) -> dict:
    """Arguments for `generate()`. `first` processes the logits before anything else.

    Beam search takes no `first`.
    """
    neutral = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": None, "typical_p": 1.0}
    if options.temperature == 0:
        return {
            "do_sample": False,
            **neutral,
            "logits_processor": LogitsProcessorList([_Finite(), *first]),
        }
    defaults = model.defaults
    top_p = defaults.top_p if options.top_p is None else options.top_p
    if options.num_beams > 1:  # transformers samples beams with PyTorch's global generator
        if options.seed is not None:
            torch.manual_seed(options.seed)
        return {
            "do_sample": True,
            "temperature": options.temperature,
            "top_p": top_p or 1.0,
            "top_k": defaults.top_k or 0,
        }
    warpers = [
        TemperatureLogitsWarper(options.temperature),
        TopKLogitsWarper(defaults.top_k) if defaults.top_k else None,
        TopPLogitsWarper(top_p) if top_p not in (None, 1.0) else None,
        MinPLogitsWarper(defaults.min_p) if defaults.min_p else None,
        TypicalLogitsWarper(defaults.typical_p) if defaults.typical_p not in (None, 1.0) else None,
    ]
    chosen = [warper for warper in warpers if warper is not None]
    return {
        "do_sample": False,
        **neutral,
        "logits_processor": LogitsProcessorList(
            [*first, *chosen, _Draw(options.seed, model.device)]
        ),
    }


class _Finite(LogitsProcessor):
    """Rejects a model whose first logits are NaN, of which any token could be the likeliest."""

    def __init__(self):
        self._is_first = True

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self._is_first and scores.isnan().any():
            raise FiddlerError(NO_NUMBERS)
        self._is_first = False
        return scores


class _Draw(LogitsProcessor):
    """Samples each token with a private generator. Greedy decoding then takes it.

    Other generations sample with their own.
    """

    def __init__(self, seed: int | None, device: torch.device):
        self._generator = torch.Generator(device)
        self._generator.seed() if seed is None else self._generator.manual_seed(seed)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        probabilities = scores.softmax(dim=-1)
        if not probabilities.isfinite().all():
            raise FiddlerError(NO_NUMBERS)
        drawn = torch.multinomial(probabilities, num_samples=1, generator=self._generator)
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn, 0.0)
