"""Answers in OpenAI's form: whole, or as chunks of a stream."""

import secrets
import time
from collections.abc import Callable

from fiddler_run.generation.answer import Answer, Piece, Token
from fiddler_run.serving.tools import ToolText

Json = dict[str, object]
Decode = Callable[[int], bytes]


class Reply:
    """An answer that is being generated. Call `piece` for each piece, then `end`.

    Each returns what a stream sends for it. After them, `whole` is the reply without a stream.
    """

    prefix = ""
    whole_object = ""
    chunk_object = ""

    def __init__(self, model: str, decode: Decode | None):
        """Begins a reply. `decode` gives a token's bytes; None leaves out probabilities."""
        self._decode = decode
        self._tokens: list[Token] = []
        self._text = ""
        self._common = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }

    def begin(self) -> list[Json]:
        return []

    def piece(self, piece: Piece) -> list[Json]:
        self._text += piece.text
        self._tokens += piece.tokens
        return [self._chunk(self._part(piece.text, piece.tokens), None)]

    def end(self, answer: Answer) -> list[Json]:
        return [self._chunk(self._part("", []), self._finish(answer))]

    def usage_chunk(self, answer: Answer) -> Json:
        return {**self._common, "object": self.chunk_object, "choices": [], "usage": usage(answer)}

    def whole(self, answer: Answer) -> Json:
        choice = {"index": 0, **self._all(), "finish_reason": self._finish(answer)}
        return {
            **self._common,
            "object": self.whole_object,
            "choices": [choice],
            "usage": usage(answer),
        }

    def _finish(self, answer: Answer) -> str:
        """Why the answer ended, in OpenAI's words."""
        return "length" if answer.finish == "length" else "stop"

    def _chunk(self, part: Json, finish: str | None) -> Json:
        choice = {"index": 0, **part, "finish_reason": finish}
        return {**self._common, "object": self.chunk_object, "choices": [choice]}

    def _part(self, text: str, tokens: list[Token]) -> Json:
        """A part of the answer, as an element of `choices`."""
        raise NotImplementedError

    def _all(self) -> Json:
        """All of the answer, as an element of `choices`."""
        raise NotImplementedError

    def _text_of(self, token: int) -> str:
        return self._decode(token).decode(errors="replace")


class ChatReply(Reply):
    prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, model: str, decode: Decode | None, max_calls: int | None = 0):
        """Begins a reply. `max_calls`: the most calls of tools. None: any number."""
        super().__init__(model, decode)
        self._max_calls = max_calls
        self._tool_text = None if max_calls == 0 else ToolText()
        self._calls: list[Json] = []

    def begin(self) -> list[Json]:
        return [self._chunk({"delta": {"role": "assistant", "content": ""}}, None)]

    def piece(self, piece: Piece) -> list[Json]:
        if self._tool_text is None:
            return super().piece(piece)
        return super().piece(Piece(self._tool_text.put(piece.text), piece.tokens))

    def end(self, answer: Answer) -> list[Json]:
        if self._tool_text is None:
            return super().end(answer)
        rest, calls = self._tool_text.finish()
        self._calls = calls[: self._max_calls]
        self._text += rest
        chunks = [self._chunk(self._part(rest, []), None)] if rest else []
        if not self._calls:
            return chunks + super().end(answer)
        calls = [{"index": number, **call} for number, call in enumerate(self._calls)]
        return [*chunks, self._chunk({"delta": {"tool_calls": calls}}, self._finish(answer))]

    def _finish(self, answer: Answer) -> str:
        finish = super()._finish(answer)
        return "tool_calls" if self._calls and finish == "stop" else finish

    def _part(self, text: str, tokens: list[Token]) -> Json:
        part: Json = {"delta": {"content": text} if text or tokens else {}}
        if self._decode is not None:
            part["logprobs"] = self._logprobs(tokens)
        return part

    def _all(self) -> Json:
        message: Json = {"role": "assistant", "content": self._text, "refusal": None}
        if self._calls:
            message |= {"content": self._text or None, "tool_calls": self._calls}
        logprobs = self._logprobs(self._tokens) if self._decode is not None else None
        return {"message": message, "logprobs": logprobs}

    def _logprobs(self, tokens: list[Token]) -> Json:
        def one(token: int, logprob: float) -> Json:
            return {
                "token": self._text_of(token),
                "logprob": logprob,
                "bytes": list(self._decode(token)),
            }

        return {
            "content": [
                {
                    **one(token.id, token.logprob),
                    "top_logprobs": [one(*other) for other in token.top.items()],
                }
                for token in tokens
            ],
            "refusal": None,
        }


class CompletionReply(Reply):
    prefix = "cmpl"
    whole_object = "text_completion"
    chunk_object = "text_completion"

    def __init__(self, model: str, decode: Decode | None):
        super().__init__(model, decode)
        self._offset = 0

    def _part(self, text: str, tokens: list[Token]) -> Json:
        return {"text": text, "logprobs": self._logprobs(tokens)}

    def _all(self) -> Json:
        self._offset = 0
        return {"text": self._text, "logprobs": self._logprobs(self._tokens)}

    def _logprobs(self, tokens: list[Token]) -> Json | None:
        if self._decode is None:
            return None
        texts = [self._text_of(token.id) for token in tokens]
        offsets = []
        for text in texts:
            offsets.append(self._offset)
            self._offset += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [
                # of those with equal text, the most likely one, which comes first
                {self._text_of(other): logprob for other, logprob in reversed(token.top.items())}
                for token in tokens
            ],
            "text_offset": offsets,
        }


def usage(answer: Answer) -> Json:
    measured = answer.measured
    return {
        "prompt_tokens": measured.prompt_tokens,
        "completion_tokens": measured.output_tokens,
        "total_tokens": measured.prompt_tokens + measured.output_tokens,
        "prompt_tokens_details": {"cached_tokens": measured.reused_tokens},
    }
