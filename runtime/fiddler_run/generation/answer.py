"""Answers one request: text as it is generated, and what was measured."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from transformers import LogitsProcessor, PreTrainedTokenizerBase, StoppingCriteria

from fiddler_run.generation.generate import (
    Measured,
    check_length,
    encode_prompt,
    generate_ids,
)
from fiddler_run.generation.grammar import Grammar
from fiddler_run.generation.model import PlannedModel
from fiddler_run.generation.sampling import Options
from fiddler_run.generation.stop_strings import StopStrings
from fiddler_run.generation.text import TextStream, answer_text

Finish = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Request:
    """What to answer and how.

    `ids` are the prompt's tokens. The answer ends before the first of the strings `stop`.
    `top_logprobs`: report the logarithm of the probability of each token, and of this many
    alternatives; None reports nothing. `grammar` restricts the text.
    """

    ids: list[int]
    options: Options
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None
    grammar: Grammar | None = None


class Token(NamedTuple):
    """A token of an answer. `logprob` and `top`, by token id, are the model's, before temperature
    and other choices of the request, but after the checkpoint's repetition penalty.
    """

    id: int
    logprob: float | None = None
    top: dict[int, float] | None = None


class Piece(NamedTuple):
    """Some text of an answer, and the tokens that make it up."""

    text: str
    tokens: list[Token]


@dataclass(frozen=True)
class Answer:
    """A finished answer. `finish` says why it ended."""

    text: str
    finish: Finish
    measured: Measured


@dataclass
class _Progress:
    """What has been generated: `text` that was passed on, and `tokens` whose text was not."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    finish: Finish = "length"


@torch.no_grad()
def answer(
    model: PlannedModel,
    tokenizer: PreTrainedTokenizerBase,
    request: Request,
    on_piece: Callable[[Piece], None],
    cancelled: threading.Event | None = None,
) -> Answer:
    """Answers a request. Passes each piece to `on_piece` when its text is certain.

    The tokens that a request shares with the previous one need not be computed again. Once
    `cancelled` is set, the answer ends after the next token.

    Raises:
        FiddlerError: the model produces no numbers, or the grammar cannot be followed.
    """
    probabilities = _Probabilities(request.top_logprobs)
    processors: list[LogitsProcessor] = []
    if request.top_logprobs is not None:
        processors.append(probabilities)
    end_tokens = model.defaults.end_tokens(tokenizer)
    if request.grammar is not None:
        size = model.config.get_text_config().vocab_size
        processors.append(request.grammar.processor(tokenizer, size, end_tokens))
    check = model.engine.resources.check_hand_over
    follower = _Follower(tokenizer, request, end_tokens, on_piece, probabilities, cancelled, check)
    ids = torch.tensor([request.ids])
    with model.session.prefix_kept(request.ids) as prefix:
        output, measured = generate_ids(
            model,
            ids,
            request.options,
            processors=processors,
            criteria=[follower],
            reused_tokens=prefix.tokens,
            pad_token_id=tokenizer.pad_token_id,
            **prefix.arguments,
        )
        prefix.keep(output[0].tolist())
    follower.end()
    return Answer(follower.progress.text, follower.progress.finish, measured)


def generate(
    model: PlannedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    options: Options,
    on_text: Callable[[str], None],
) -> Measured:
    """Generates from a prompt. Passes the text to `on_text` as it is generated or, with beam
    search, at the end.

    Raises:
        FiddlerError: the prompt cannot be encoded (see `encode_prompt`) or does not fit (see
            `check_length`).
    """
    ids = encode_prompt(tokenizer, prompt, options.chat, model.plan, model.config.vocab_size)
    check_length(ids.shape[1], options, model.plan)
    prompt_ids = ids[0].tolist()
    if options.num_beams == 1:
        request = Request(prompt_ids, options)
        return answer(model, tokenizer, request, lambda piece: on_text(piece.text)).measured
    output, measured = generate_ids(model, ids, options, pad_token_id=tokenizer.pad_token_id)
    on_text(answer_text(tokenizer, prompt_ids, output[0, ids.shape[1] :].tolist()))
    return measured


class _Probabilities(LogitsProcessor):
    """Remembers the logarithms of the probabilities of the next token."""

    def __init__(self, top: int | None):
        self._top = top or 0
        self._logprobs: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self._logprobs = scores[0].float().log_softmax(dim=-1)
        return scores

    def of(self, token: int) -> Token:
        if self._logprobs is None:
            return Token(token)
        values, ids = self._logprobs.topk(self._top)
        top = dict(zip(ids.tolist(), values.tolist(), strict=True))
        return Token(token, float(self._logprobs[token]), top)


class _Follower(StoppingCriteria):
    """Follows a generation: passes its text on, and stops it."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        request: Request,
        end_tokens: list[int],
        on_piece: Callable[[Piece], None],
        probabilities: _Probabilities,
        cancelled: threading.Event | None,
        check: Callable[[], None],
    ):
        self.progress = _Progress()
        self._text = TextStream(tokenizer, request.ids)
        self._stop = StopStrings(request.stop)
        self._end_tokens = set(end_tokens)
        self._on_piece = on_piece
        self._probabilities = probabilities
        self._cancelled = cancelled
        self._check = check

    def __call__(self, input_ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
        token = int(input_ids[0, -1])
        self._check()  # before a wrong token is passed on
        if token in self._end_tokens:
            self.progress.finish = "stop"
        else:
            self.progress.tokens.append(self._probabilities.of(token))
            self._send(self._stop.put(self._text.put(token)))
            if self._stop.found:
                self.progress.finish = "stop"
            elif self._cancelled is not None and self._cancelled.is_set():
                self.progress.finish = "cancelled"
        ends = self.progress.finish != "length"
        return torch.full((1,), ends, dtype=torch.bool, device=input_ids.device)

    def end(self) -> None:
        """Passes the rest of the text on."""
        if not self._stop.found:
            rest = self._stop.put(self._text.finish())
            if self._stop.found:
                self.progress.finish = "stop"
            self._send(rest + self._stop.finish())
        if self.progress.tokens and not self._stop.found:
            self._on_piece(Piece("", self._taken()))

    def _send(self, text: str) -> None:
        if text:
            self.progress.text += text
            self._on_piece(Piece(text, self._taken()))

    def _taken(self) -> list[Token]:
        tokens = self.progress.tokens
        self.progress.tokens = []
        return tokens
