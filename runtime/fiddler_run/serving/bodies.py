"""The bodies of the API's requests, as OpenAI defines them.

What is not supported is refused, unless it asks for what happens anyway. `null` is the same as
leaving a key out.
"""

import json
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from fiddler_run.serving.errors import ApiError

MAX_STOP_STRINGS = 16
MAX_ALTERNATIVES = 20  # of a token


def only(*values: object) -> BeforeValidator:
    """Accepts these values alone."""

    def check(value: object) -> object:
        if value not in values:
            raise PydanticCustomError("unsupported", "this value is not supported; omit the key")
        return value

    return BeforeValidator(check)


def _not_empty(stop: str | list[str]) -> list[str]:
    strings = [stop] if isinstance(stop, str) else stop
    if len(strings) > MAX_STOP_STRINGS or not all(strings):
        raise PydanticCustomError(
            "stop", f"give at most {MAX_STOP_STRINGS} strings that are not empty"
        )
    return strings


Neutral = Annotated[Any, only(0, 0.0)]


class Section(BaseModel):
    """A JSON object. Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_null(cls, data: object) -> object:
        if isinstance(data, dict):
            return {key: value for key, value in data.items() if value is not None}
        return data


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
    user: str | None = None
    n: Annotated[Any, only(1)] = 1
    presence_penalty: Neutral = 0
    frequency_penalty: Neutral = 0
    logit_bias: Annotated[Any, only({})] = {}

    @classmethod
    def parse(cls, content: bytes) -> Self:
        """Parses a request.

        Raises:
            ApiError: it is no JSON, or not of this form.
        """
        try:
            return cls.model_validate_json(content)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
            where = ".".join(map(str, first["loc"]))
            message = first["msg"].removeprefix("Value error, ")
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

    prompt: str | list[str] | list[Annotated[int, Field(ge=0)]] | list[list[int]]
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


class TextPart(Section):
    type: Literal["text"]
    text: str


class CalledFunction(Section):
    name: str
    arguments: str


class ToolCall(Section):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Section):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] = ""
    name: str | None = None
    tool_calls: list[ToolCall] = []
    tool_call_id: str | None = None
    annotations: Annotated[Any, only([])] = []

    def for_template(self) -> dict[str, object]:
        """The message as chat templates expect it."""
        role = "system" if self.role == "developer" else self.role
        content = self.content
        if not isinstance(content, str):
            content = "".join(part.text for part in content)
        message: dict[str, object] = {"role": role, "content": content}
        if self.name is not None:
            message["name"] = self.name
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        if self.tool_calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {
                        "name": call.function.name,
                        "arguments": _object_or_text(call.function.arguments),
                    },
                }
                for call in self.tool_calls
            ]
        return message


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

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_ALTERNATIVES)] | None = None
    response_format: ResponseFormat = ResponseFormat(type="text")
    tools: list[Tool] = []
    tool_choice: Annotated[Any, only("auto", "none")] = "auto"
    parallel_tool_calls: bool = True
    store: Annotated[Any, only(False)] = False

    @property
    def may_call(self) -> bool:
        """True if the answer may call tools."""
        return bool(self.tools) and self.tool_choice == "auto"


def _object_or_text(arguments: str) -> object:
    """The arguments of a call as an object, which most templates expect, if they are one."""
    try:
        parsed = json.loads(arguments)
    except ValueError:
        return arguments
    return parsed if isinstance(parsed, dict) else arguments
