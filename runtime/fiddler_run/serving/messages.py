"""The messages of a conversation, as OpenAI defines them."""

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)
from pydantic_core import PydanticCustomError

Item = TypeVar("Item")
# a million errors would take long, and gigabytes
FailFastList = Annotated[list[Item], Field(fail_fast=True)]


def only(*values: object) -> BeforeValidator:
    """Accepts these values alone."""

    def check(value: object) -> object:
        if value not in values:
            raise PydanticCustomError("unsupported", "this value is not supported; omit the key")
        return value

    return BeforeValidator(check)


class Section(BaseModel):
    """A JSON object. Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_null(cls, data: object) -> object:
        if isinstance(data, dict):
            return {key: value for key, value in data.items() if value is not None}
        return data


def _text_only(content: object) -> object:
    parts = content if isinstance(content, list) else []
    kinds = {part.get("type", "text") for part in parts if isinstance(part, dict)}
    if kinds - {"text"}:
        raise PydanticCustomError("unsupported", "only parts of the type text are supported")
    return content


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
    index: int | None = None


class Message(Section):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str | FailFastList[TextPart], BeforeValidator(_text_only)] = ""
    reasoning_content: str | None = None
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
        for key in ("name", "tool_call_id", "reasoning_content"):
            if (value := getattr(self, key)) is not None:
                message[key] = value
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


def _object_or_text(arguments: str) -> object:
    """The arguments of a call as an object, which most templates expect, if they are one."""
    try:
        parsed = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    return parsed if isinstance(parsed, dict) else arguments
