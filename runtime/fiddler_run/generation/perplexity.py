"""The perplexity of a text: how well a model predicts each token from those before it."""

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase
from transformers.modeling_outputs import MoeModelOutputWithPast

from fiddler_run.errors import FiddlerError
from fiddler_run.generation.model import PlannedModel
from fiddler_run.generation.prefill import prefill, require_chunks
from fiddler_run.generation.recorder import replaced
from fiddler_run.generation.sampling import NO_NUMBERS
from fiddler_run.models.dispatched import DispatchedModel

HEAD_TOKENS = 16  # whose logits are computed at once: those of a chunk could exceed GPU memory


@dataclass(frozen=True)
class Perplexity:
    """`value` is exp(mean loss in nats) over `tokens` predicted tokens in `windows` windows.

    `standard_error` is that of `value`, if the tokens' losses were independent. `bits_per_byte` of
    the text compares models with different tokenizers.
    """

    tokens: int
    windows: int
    value: float
    standard_error: float
    bits_per_byte: float


@torch.no_grad()
def perplexity(
    model: PlannedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: list[int],
    on_window: Callable[[int, int], None] = lambda number, count: None,
) -> Perplexity:
    """The perplexity of a text in windows of the plan's context, each independent of the others.

    Every window begins with the tokenizer's initial token, if `ids` do. A window's first token is
    not predicted.

    Args:
        ids: the text's tokens.
        on_window: called with the number of windows that are done, and of all.

    Raises:
        FiddlerError: the text has fewer than two tokens, the model cannot use the plan's cache, or
            its probabilities are not numbers.
    """
    if not model._supports_default_dynamic_cache():
        raise FiddlerError(
            f"--perplexity: {model.config.model_type} has a cache of its own; use another model"
        )
    windows = list(_windows(ids, model.plan.workload.max_seq_len, tokenizer.bos_token_id))
    if not windows:
        raise FiddlerError("--perplexity: the text has fewer than two tokens; give a longer one")
    losses = []
    with model.session.turn():
        for number, window in enumerate(windows, 1):
            losses.append(_losses(model, torch.tensor([window], device=model.device)))
            on_window(number, len(windows))
        model.cache.reset()
    nats = torch.cat(losses).double()
    mean = float(nats.mean())
    if math.isnan(mean):
        raise FiddlerError(NO_NUMBERS)
    value = math.exp(mean) if mean < math.log(sys.float_info.max) else math.inf
    # all at once: windows may end within a character
    predicted = [token for window in windows for token in window[1:]]
    num_bytes = len(tokenizer.decode(predicted).encode())
    spread = float(nats.std()) / math.sqrt(len(nats)) if len(nats) > 1 else math.nan
    return Perplexity(
        tokens=len(nats),
        windows=len(windows),
        value=value,
        standard_error=value * spread,
        bits_per_byte=float(nats.sum()) / math.log(2) / num_bytes,
    )


def _windows(ids: list[int], context: int, initial: int | None) -> Iterator[list[int]]:
    """Cuts a text into windows of at most `context` tokens."""
    begins = [initial] if initial is not None and ids[:1] == [initial] else []
    text = ids[len(begins) :]
    size = context - len(begins)
    for start in range(0, len(text), size):
        window = [*begins, *text[start : start + size]]
        if len(window) > 1:
            yield window


def _losses(model: PlannedModel, ids: torch.Tensor) -> torch.Tensor:
    """The loss in nats of each token of [1, tokens] but the first, float32 on the CPU."""
    chunk = model.plan.prefill_chunk_tokens
    if ids.shape[1] > chunk:
        require_chunks(model, ids.shape[1], chunk)
    model.cache.reset(1)
    found = []

    def add(start: int, states: torch.Tensor) -> None:
        targets = ids[0, start + 1 :][: states.shape[1]]
        for part, expected in zip(
            states.split(HEAD_TOKENS, dim=1), targets.split(HEAD_TOKENS), strict=False
        ):
            logits = _logits(model, part[:, : len(expected)])
            found.append(cross_entropy(logits[0].float(), expected, reduction="none").cpu())

    prefill(model, model.cache, ids, torch.ones_like(ids), chunk, add)
    return torch.cat(found)


def _logits(model: PlannedModel, states: torch.Tensor) -> torch.Tensor:
    """The logits for the last layer's states, by the model's own forward: some families scale
    them.
    """
    output = MoeModelOutputWithPast(last_hidden_state=states)
    with replaced(model.base_model, "forward", lambda *_, **__: output):
        ids = torch.zeros(states.shape[:2], dtype=torch.long, device=states.device)
        return DispatchedModel.forward(model, input_ids=ids).logits
