"""Calls of tools in an answer, in the form that Qwen, Hermes and others were trained to write:

<tool_call>
{"name": "weather", "arguments": {"city": "Paris"}}
</tool_call>
"""

import json
import re
import secrets

from transformers import PreTrainedTokenizerBase

from fiddler_run.generation.stop_strings import StopStrings

MARK = "<tool_call>"
CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)


def knows_tools(tokenizer: PreTrainedTokenizerBase) -> bool:
    """True if the chat template describes tools and asks for calls in this form."""
    template = tokenizer.chat_template
    text = json.dumps(template) if isinstance(template, dict) else template or ""
    return "tools" in text and MARK in text and "arguments" in text


class ToolText:
    """Separates the text of an answer from the calls at its end."""

    def __init__(self):
        self._text = StopStrings((MARK,))
        self._calls = ""

    def put(self, text: str) -> str:
        """The text that is certainly no call, after `text` has been added."""
        if self._text.found:
            self._calls += text
            return ""
        certain = self._text.put(text)
        if self._text.found:
            self._calls = self._text.held
        return certain

    def finish(self) -> tuple[str, list[dict[str, object]]]:
        """The rest of the text, and the calls. What is no correct call is text."""
        if not self._text.found:
            return self._text.finish(), []
        calls = [_call(found) for found in CALL.findall(self._calls)]
        if not calls or None in calls:
            return self._calls, []
        return "", calls


def _call(text: str) -> dict[str, object] | None:
    """A call in OpenAI's form. None if it is incorrect."""
    try:
        call = json.loads(text)
        name = call["name"]
        arguments = call.get("arguments", {})
    except (ValueError, KeyError):
        return None
    if not isinstance(name, str):
        return None
    return {
        "id": f"call_{secrets.token_hex(12)}",
        "type": "function",
        "function": {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)},
    }
