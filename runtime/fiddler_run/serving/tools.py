"""Calls of tools in an answer, in the form that Qwen, Hermes and others were trained to write:

<tool_call>
{"name": "weather", "arguments": {"city": "Paris"}}
</tool_call>
"""

import json
import secrets

from transformers import PreTrainedTokenizerBase

from fiddler_run.generation.stop_strings import StopStrings

BEGIN = "<tool_call>"
END = "</tool_call>"


def knows_tools(tokenizer: PreTrainedTokenizerBase) -> bool:
    """True if the chat template describes tools and asks for calls in this form."""
    template = tokenizer.chat_template
    text = json.dumps(template) if isinstance(template, dict) else template or ""
    return "tools" in text and BEGIN in text and "arguments" in text


class ToolText:
    """Separates the text of an answer from the calls in it."""

    def __init__(self):
        self._text = StopStrings((BEGIN,))
        self._rest = ""

    def put(self, text: str) -> str:
        """The text that certainly precedes all calls, after `text` has been added."""
        if self._text.found:
            self._rest += text
            return ""
        certain = self._text.put(text)
        if self._text.found:
            self._rest = self._text.held
        return certain

    def finish(self) -> tuple[str, list[dict[str, object]]]:
        """The rest of the text, and the calls. An incorrect call is text."""
        if not self._text.found:
            return self._text.finish(), []
        calls = []
        text = ""
        rest = self._rest
        while BEGIN in rest:
            before, _, part = rest.partition(BEGIN)
            call, after = _call(part)
            if call is None:
                text += before + BEGIN
            else:
                calls.append(call)
                text += before
            rest = after
        text += rest
        return text if not calls or text.strip() else "", calls


def _call(text: str) -> tuple[dict[str, object] | None, str]:
    """The call with which a text begins, in OpenAI's form, and what follows it. None: no call."""
    start = len(text) - len(text.lstrip())
    try:
        found, stop = json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError):
        return None, text
    rest = text[stop:].lstrip()
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        return None, text
    if END not in rest.partition(BEGIN)[0]:  # it may be that of another call
        return None, text
    arguments = found.get("arguments") or {}
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    call = {
        "id": f"call_{secrets.token_hex(12)}",
        "type": "function",
        "function": {"name": found["name"], "arguments": arguments},
    }
    return call, rest.removeprefix(END)
