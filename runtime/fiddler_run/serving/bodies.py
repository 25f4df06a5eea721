"""The bodies of the API's requests, as OpenAI defines them.

What is not supported is refused, unless it asks for what happens anyway. `null` is the same as
leaving a key out.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    Field,
    ValidationError,
)
from pydantic_core import PydanticCustomError

from fiddler_run.serving.errors import ApiError
from fiddler_run.serving.messages import FailFastList, Message, Section, only

MAX_STOP_STRINGS = 16
MAX_ALTERNATIVES = 20  # of a token


def _not_empty(stop: str | list[str]) -> list[str]:
    strings = [stop] if isinstance(stop, str) else stop
    if len(strings) > MAX_STOP_STRINGS or not all(strings):
        raise PydanticCustomError(
            "stop", f"give at most {MAX_STOP_STRINGS} strings that are not empty"
        )
    return strings


TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Neutral = Annotated[Any, only(0, 0.0)]


def _is_key(part: str | int) -> bool:
    """False for pydantic's names of the kinds in a union."""
    return isinstance(part, int) or (part != "str" and "[" not in part)


class StreamOptions(Section):
    include_usage: bool = False
    include_obfuscation: Annotated[Any, only(False)] = False


class Body(Section):
    """What both kinds of completions have in common."""

    model: str
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[str | list[str], AfterValidator(_not_empty)] = []
    # without effect on an answer
    user: str | None = None
    metadata: dict[str, Any] = {}
    store: bool = False
    service_tier: Annotated[Any, only("auto", "default")] = "auto"
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    n: Annotated[Any, only(1)] = 1
    presence_penalty: Neutral = 0
    frequency_penalty: Neutral = 0
    logit_bias: Annotated[Any, only({})] = {}

    @classmethod
    def parse(cls, content: bytes) -> Self:
        """Parses a request.

        Raises:
            ApiError: it is not JSON, or not of this form.
        """
        try:
            return cls.model_validate_json(content)
        except ValidationError as error:
            errors = error.errors(include_url=False, include_context=False, include_input=False)
            first = max(errors, key=lambda each: len(each["loc"]))  # of a union's kinds
            where = ".".join(str(part) for part in first["loc"] if _is_key(part))
            message = first["msg"]
            if first["type"] == "extra_forbidden":
                message = "this key is not supported; omit it"
            raise ApiError(400, f"{where or 'body'}: {message}", param=where or None) from None

    def require_model(self, name: str) -> None:
        """Checks that the request is for the model that is served.

        Raises:
            ApiError: it names another.
        """
        if self.model != name:
            raise ApiError(
                404,
                f"model: {self.model!r} is not served here; use {name!r}",
                param="model",
                code="model_not_found",
            )


class CompletionBody(Body):
    """A request to continue a text, or token ids."""

    prompt: str | FailFastList[str] | FailFastList[TokenId] | FailFastList[FailFastList[TokenId]]
    logprobs: Annotated[int, Field(ge=0, le=MAX_ALTERNATIVES)] | None = None
    echo: Annotated[Any, only(False)] = False
    best_of: Annotated[Any, only(1)] = 1
    suffix: Annotated[Any, only("")] = ""

    @property
    def text_or_ids(self) -> str | list[int]:
        """The only prompt.

        Raises:
            ApiError: there are several, or none.
        """
        prompt = self.prompt
        if isinstance(prompt, list) and len(prompt) == 1 and not isinstance(prompt[0], int):
            prompt = prompt[0]
        if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
            return prompt
        raise ApiError(400, "prompt: give exactly one prompt in each request", param="prompt")


class JsonSchema(Section):
    name: str
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    description: str | None = None
    strict: bool = True


class ResponseFormat(Section):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Function(Section):
    name: str
    description: str | None = None
    parameters: dict[str, Any] = {}
    strict: Annotated[Any, only(False)] = False


class Tool(Section):
    type: Literal["function"]
    function: Function


class ChatBody(Body):
    """A request to continue a conversation."""

    messages: Annotated[FailFastList[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_ALTERNATIVES)] | None = None
    response_format: ResponseFormat = ResponseFormat(type="text")
    tools: list[Tool] = []
    tool_choice: Annotated[Any, only("auto", "none")] = "auto"
    parallel_tool_calls: bool = True

    @property
    def max_calls(self) -> int | None:
        """The most calls of tools in the answer. None: any number."""
        if not self.tools or self.tool_choice == "none":
            return 0
        return None if self.parallel_tool_calls else 1
