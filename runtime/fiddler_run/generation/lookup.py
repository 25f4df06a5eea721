"""Prompt lookup: proposes tokens that followed the same text before, and checks them in one pass.

A decoding method for transformers' `generate(custom_generate=...)`. transformers' own prompt lookup
takes matches of 2 tokens, passes a prompt at once and again with a cache that holds its prefix, and
calls stopping criteria once for several tokens.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor
from transformers import (
    Cache,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)

from fiddler_run.errors import FiddlerError
from fiddler_run.generation.cache import KeyValueCache
from fiddler_run.generation.lookup_gate import LookupGate

MIN_MATCH = 8  # tokens; shorter matches are followed by something else too often
MAX_MATCH = 64  # longer matches count as equal
MAX_PLACES = 32  # occurrences to compare, the last ones


def require_lookup(model: PreTrainedModel) -> None:
    """Checks that the model's cache can drop the tokens that were proposed in vain.

    Raises:
        FiddlerError: it cannot.
    """
    known = model._supports_default_dynamic_cache()
    if not known or not KeyValueCache(model.config, 1, 1).can_crop:
        raise FiddlerError(
            f"--lookup: the cache of {model.config.model_type} cannot drop tokens, because it holds"
            " recurrent states or sliding windows; remove the flag"
        )


class Occurrences:
    """Finds earlier occurrences of the last tokens of a sequence that grows."""

    def __init__(self, tokens: list[int]):
        self._tokens: list[int] = []
        self._places: dict[tuple[int, ...], list[int]] = {}  # of the token after MIN_MATCH others
        for token in tokens:
            self.add(token)

    def add(self, token: int) -> None:
        place = len(self._tokens)
        if place >= MIN_MATCH:
            self._places.setdefault(self._last(), []).append(place)
        self._tokens.append(token)

    def following(self, count: int) -> list[int]:
        """The `count` tokens that followed the longest earlier occurrence, the last of equals.

        Empty if fewer than MIN_MATCH tokens match. An occurrence that overlaps the end is repeated.
        """
        places = self._places.get(self._last(), []) if count > 0 else []
        if not places:
            return []
        length = len(self._tokens)
        start = max(places[-MAX_PLACES:], key=lambda place: (self._match(place), place))
        found: list[int] = []
        for place in range(start, start + count):
            found.append(self._tokens[place] if place < length else found[place - length])
        return found

    def _last(self) -> tuple[int, ...]:
        return tuple(self._tokens[-MIN_MATCH:])

    def _match(self, place: int) -> int:
        """How many tokens before `place` equal the last ones."""
        tokens = self._tokens
        longest = min(place, MAX_MATCH)
        return next(
            (size for size in range(longest) if tokens[place - 1 - size] != tokens[-1 - size]),
            longest,
        )


class LookupDecoding:
    """Decodes one sequence as greedy search does. `passes` counts the passes after the prompt's.

    Logits processors and stopping criteria see every token in turn, as without proposals, so
    processors that draw tokens or keep states work, and draw the same.
    """

    def __init__(self, gate: LookupGate):
        self.passes = 0
        self._gate = gate

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: object,
    ) -> Tensor:
        """Continues input_ids [1, n] until a criterion is met. Returns ids [1, n + new]."""
        text = _Text(input_ids, logits_processor, stopping_criteria)
        # no reference: some models return the logits of the whole prompt
        first = model._prefill(input_ids, generation_config, model_kwargs).logits[:, -1]
        ended = text.append(text.choose(first))
        del first
        occurrences = Occurrences(text.ids[0].tolist())
        cache = model_kwargs["past_key_values"]
        while not ended:
            room = generation_config.max_length - text.ids.shape[1] - 1  # a pass adds one more
            draft = occurrences.following(min(self._gate.draft_tokens(), room))
            ended = self._pass(model, cache, text, occurrences, draft)
        return text.ids

    def _pass(
        self,
        model: PreTrainedModel,
        cache: Cache,
        text: _Text,
        occurrences: Occurrences,
        draft: list[int],
    ) -> bool:
        """Appends the proposed tokens that are right, and one more. True if the text ends."""
        started = time.perf_counter()
        logits = _logits(model, cache, text.ids, draft)
        accepted = 0
        for place in range(len(draft) + 1):
            token = text.choose(logits[:, place])
            chosen = int(token)
            if place == 0:  # what others do with the tokens takes as long without proposals
                seconds = time.perf_counter() - started
            occurrences.add(chosen)
            ended = text.append(token)
            if ended or place == len(draft) or chosen != draft[place]:
                break
            accepted += 1
        self.passes += 1
        surplus = cache.get_seq_length() - (text.ids.shape[1] - 1)
        if surplus > 0:
            cache.crop(-surplus)
        if not ended:
            self._gate.record(len(draft), accepted, seconds)
        return ended


class _Text:
    """The tokens so far, and how the next one is chosen."""

    def __init__(
        self, ids: Tensor, processors: LogitsProcessorList, criteria: StoppingCriteriaList
    ):
        self.ids = ids
        self._processors = processors
        self._criteria = criteria

    def choose(self, logits: Tensor) -> Tensor:
        """The next token [1], from logits [1, vocabulary]."""
        scores = logits.to(copy=True, dtype=torch.float32, device=self.ids.device)
        return self._processors(self.ids, scores).argmax(dim=-1)

    def append(self, token: Tensor) -> bool:
        """Appends a token [1]. True if the text ends with it."""
        self.ids = torch.cat([self.ids, token[:, None]], dim=-1)
        return bool(self._criteria(self.ids, None).all())


def _logits(model: PreTrainedModel, cache: Cache, ids: Tensor, draft: list[int]) -> Tensor:
    """Logits [1, 1 + len(draft), vocabulary] after the last token and each proposed one."""
    if draft:
        ids = torch.cat([ids, ids.new_tensor([draft])], dim=-1)
    inputs = model.prepare_inputs_for_generation(
        ids, next_sequence_length=1 + len(draft), past_key_values=cache, use_cache=True
    )
    return model(**inputs, return_dict=True).logits
