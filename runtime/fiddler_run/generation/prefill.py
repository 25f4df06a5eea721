"""Passes the beginning of a prompt through a model in chunks."""

from collections.abc import Callable

import torch
from transformers import Cache, PreTrainedModel

from fiddler_run.errors import FiddlerError

# transformers' implementations that continue their recurrent states by single tokens only
FORGET_BETWEEN_CHUNKS = ("jamba",)


def forgets_between_chunks(model: PreTrainedModel) -> bool:
    """True if a second chunk of a prompt would be computed without the first."""
    return model.config.model_type in FORGET_BETWEEN_CHUNKS


def require_chunks(model: PreTrainedModel, tokens: int, chunk: int) -> None:
    """Checks that a prompt of more than one chunk can be computed.

    Raises:
        FiddlerError: it cannot.
    """
    if forgets_between_chunks(model):
        raise FiddlerError(
            f"the prompt has {tokens} tokens, more than the plan's prefill chunk of {chunk}, which"
            f" transformers' {model.config.model_type} cannot continue; shorten it, or plan again"
            " with more --gpu-mem"
        )


@torch.no_grad()
def prefill(
    model: PreTrainedModel,
    cache: Cache,
    ids: torch.Tensor,
    mask: torch.Tensor,
    chunk: int,
    on_states: Callable[[int, torch.Tensor], None] = lambda start, states: None,
) -> None:
    """Takes the tokens [sequences, tokens] that a cache does not hold into it, by chunks.

    `mask` [sequences, at least as many tokens] is zero for padding. `on_states` takes a chunk's
    first token and the last layer's states [sequences, tokens of the chunk, hidden].
    """
    positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
    for start in range(cache.get_seq_length(), ids.shape[1], chunk):
        stop = min(start + chunk, ids.shape[1])
        output = model.base_model(
            input_ids=ids[:, start:stop],
            position_ids=positions[:, start:stop],
            attention_mask=mask[:, :stop],
            past_key_values=cache,
            use_cache=True,
        )
        on_states(start, output.last_hidden_state)
