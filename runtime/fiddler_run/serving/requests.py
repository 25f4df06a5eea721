"""Turns the bodies of the API's requests into requests to the model."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from llguidance import LLTokenizer
from transformers import PreTrainedTokenizerBase

from fiddler_run.errors import FiddlerError
from fiddler_run.generation.answer import Request
from fiddler_run.generation.defaults import MIN_TEMPERATURE, GenerationDefaults
from fiddler_run.generation.grammar import ANY_OBJECT, Grammar
from fiddler_run.generation.sampling import Options
from fiddler_run.generation.text import chat_text, token_ids
from fiddler_run.generation.vocabulary import vocabulary
from fiddler_run.plan.schema import Plan
from fiddler_run.serving.bodies import Body, ChatBody, CompletionBody, ResponseFormat
from fiddler_run.serving.errors import ApiError
from fiddler_run.serving.tools import knows_tools


@dataclass(frozen=True)
class Defaults:
    """What requests leave open, from the command line. None: from the checkpoint or the plan."""

    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    lookup: bool = False


class Requests:
    """Makes requests to one model."""

    def __init__(
        self,
        plan: Plan,
        tokenizer: PreTrainedTokenizerBase,
        vocab_size: int,
        recommended: GenerationDefaults,
        defaults: Defaults,
    ):
        self._plan = plan
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._recommended = recommended
        self._defaults = defaults
        self._lock = threading.Lock()  # encoding changes a tokenizer's settings

    def of_chat(self, body: ChatBody) -> Request:
        """Raises ApiError if the conversation or an option cannot be used."""
        tools = body.tools if body.max_calls != 0 else []
        if tools and not knows_tools(self._tokenizer):
            raise ApiError(
                400,
                "tools: this model's chat template does not ask for calls of tools in a form that"
                " is supported; omit them",
                param="tools",
            )
        grammar = _grammar(body.response_format)
        if grammar is not None and tools:
            raise ApiError(400, "response_format: omit it, or the tools", param="response_format")
        messages = [message.for_template() for message in body.messages]
        described = [
            tool.model_dump(exclude_unset=True, exclude={"function": {"strict"}}) for tool in tools
        ]
        with self._lock, _refusing("messages"):
            text = chat_text(self._tokenizer, messages, "messages", tools=described or None)
            ids = self._ids(text, special_tokens=False)
        top = (body.top_logprobs or 0) if body.logprobs else None
        if body.top_logprobs and not body.logprobs:
            raise ApiError(400, "top_logprobs: needs logprobs: true", param="top_logprobs")
        max_tokens = body.max_completion_tokens or body.max_tokens
        return self._request(body, ids, max_tokens, top, grammar, "messages")

    def of_completion(self, body: CompletionBody) -> Request:
        """Raises ApiError if the prompt or an option cannot be used."""
        prompt = body.text_or_ids
        if isinstance(prompt, str):
            with self._lock, _refusing("prompt"):
                prompt = self._ids(prompt, special_tokens=True)
        unknown = next((token for token in prompt if token >= self._vocab_size), None)
        if unknown is not None:
            raise ApiError(
                400, f"prompt: there is no token {unknown}; the last one is {self._vocab_size - 1}"
            )
        return self._request(body, prompt, body.max_tokens, body.logprobs, None, "prompt")

    @property
    def can_chat(self) -> bool:
        return self._tokenizer.chat_template is not None

    def token_decoder(self) -> Callable[[int], bytes]:
        """Gives the bytes of a token. Those of a special token are its name."""
        known = self._vocabulary()
        return lambda token: known.decode_bytes([token])

    def _vocabulary(self) -> LLTokenizer:
        end_tokens = self._recommended.end_tokens(self._tokenizer)
        with _refusing("logprobs"):
            return vocabulary(self._tokenizer, self._vocab_size, end_tokens)

    def _ids(self, text: str, special_tokens: bool) -> list[int]:
        context = self._plan.workload.max_seq_len
        return token_ids(
            self._tokenizer, text, context, self._vocab_size, "the text", special_tokens
        )

    def _request(
        self,
        body: Body,
        ids: list[int],
        max_tokens: int | None,
        top: int | None,
        grammar: Grammar | None,
        param: str,
    ) -> Request:
        if "stream_options" in body.model_fields_set and not body.stream:
            raise ApiError(400, "stream_options: needs stream: true", param="stream_options")
        if top is not None:
            self._vocabulary()  # made now, in a thread that may take its time
        options = self._options(body, self._max_new_tokens(len(ids), max_tokens, param))
        return Request(ids, options, tuple(body.stop), top, grammar)

    def _max_new_tokens(self, prompt_tokens: int, asked: int | None, param: str) -> int:
        context = self._plan.workload.max_seq_len
        room = context - prompt_tokens
        if room < (asked or 1):
            answer = f" and max_tokens is {asked}" if asked else ""
            raise ApiError(
                400,
                f"the prompt has {prompt_tokens} tokens{answer}, but the context is {context};"
                " shorten it, or plan again with a larger --max-seq-len",
                param=param if room < 1 else "max_tokens",
                code="context_length_exceeded",
            )
        return asked or min(room, self._defaults.max_new_tokens or room)

    def _options(self, body: Body, max_new_tokens: int) -> Options:
        defaults = self._defaults
        temperature = _first(
            body.temperature, defaults.temperature, self._recommended.temperature, 1.0
        )
        seed = _first(body.seed, defaults.seed)
        return Options(
            max_new_tokens=max_new_tokens,
            # dividing by less would overflow, and choose the likeliest token as well
            temperature=0.0 if temperature < MIN_TEMPERATURE else temperature,
            top_p=_first(body.top_p, defaults.top_p),
            seed=None if seed is None else seed % 2**63,
            lookup=defaults.lookup,
        )


@contextmanager
def _refusing(param: str) -> Iterator[None]:
    """Turns a FiddlerError about a request into an ApiError."""
    try:
        yield
    except FiddlerError as error:
        raise ApiError(400, str(error), param=param) from None


def _grammar(format: ResponseFormat) -> Grammar | None:
    if (format.json_schema is None) == (format.type == "json_schema"):
        raise ApiError(
            400,
            "response_format.json_schema: goes with the type json_schema, and no other",
            param="response_format",
        )
    if format.type == "text":
        return None
    if format.type == "json_object":
        return Grammar(ANY_OBJECT, "response_format")
    with _refusing("response_format"):
        return Grammar(format.json_schema.schema_, "response_format")


def _first(*values: object) -> object:
    """The first value that is not None, or None."""
    return next((value for value in values if value is not None), None)
