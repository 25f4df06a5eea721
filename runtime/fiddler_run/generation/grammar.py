"""Restricts an answer to JSON, by the library llguidance."""

import json

import numpy as np
import torch
from llguidance import LLMatcher
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from fiddler_run.errors import FiddlerError
from fiddler_run.generation.text import library_errors
from fiddler_run.generation.vocabulary import vocabulary

# Otherwise, a model may write spaces without end.
COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
ANY_OBJECT = {"type": "object"}


class GrammarError(FiddlerError):
    """A text cannot be restricted to a schema."""


class Grammar:
    """The JSON texts that a schema allows."""

    def __init__(self, schema: dict, where: str):
        """Compiles a schema. `where` names it in errors.

        Raises:
            FiddlerError: it is not a JSON schema, or llguidance does not support it.
        """
        with library_errors(where, "correct the schema"):
            self._compiled = LLMatcher.grammar_from_json_schema(json.dumps(schema), COMPACT)
        problem = LLMatcher.validate_grammar(self._compiled)
        if problem:
            raise FiddlerError(f"{where}: {problem.strip().splitlines()[0]}; correct the schema")

    def processor(
        self, tokenizer: PreTrainedTokenizerBase, vocab_size: int, end_tokens: list[int]
    ) -> LogitsProcessor:
        """Excludes every token after which no text of the grammar is possible.

        Args:
            vocab_size: of the logits.
            end_tokens: may follow a complete text, and nothing else may.

        Raises:
            FiddlerError: the tokenizer has no fast implementation.
        """
        restricted = vocabulary(tokenizer, vocab_size, end_tokens)
        return _Allowed(LLMatcher(restricted, self._compiled))


class _Allowed(LogitsProcessor):
    def __init__(self, matcher: LLMatcher):
        self._matcher = matcher
        self._has_begun = False

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self._has_begun:
            self._matcher.consume_token(int(input_ids[0, -1]))
        self._has_begun = True
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():
            raise GrammarError(f"response_format: {self._matcher.get_error()}; use a simpler one")
        allowed = np.unpackbits(bits, bitorder="little")[: scores.shape[1]].astype(bool)
        excluded = torch.from_numpy(~allowed).to(scores.device)
        return scores.masked_fill(excluded, -torch.inf)
