"""Calls of tools: found in an answer's text wherever it is divided."""

import copy
import json
import random

import pytest
from conftest import DEMO, demo_shape, make_plan
from transformers import AutoTokenizer

from fiddler_run.engine.calls import Traffic
from fiddler_run.generation.answer import Answer, Piece
from fiddler_run.generation.defaults import GenerationDefaults
from fiddler_run.generation.generate import Measured
from fiddler_run.serving.bodies import ChatBody
from fiddler_run.serving.messages import Message
from fiddler_run.serving.replies import ChatReply
from fiddler_run.serving.requests import Defaults, Requests
from fiddler_run.serving.tools import ToolText, knows_tools

WEATHER = '{"name": "weather", "arguments": {"city": "Paris"}}'
TIME = '{"name": "time"}'
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }} Answer with <tool_call>{name, arguments}</tool_call>"
    "{% endif %}{% for message in messages %}{{ message.content }}{% endfor %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO)


def wrapped(*calls: str) -> str:
    return "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in calls)


def answer(text: str) -> Answer:
    nothing = Traffic()
    return Answer(text, "stop", Measured(3, 9, 0.1, 5.0, [nothing], [nothing], 0))


@pytest.mark.parametrize(
    ("text", "content", "names"),
    [
        ("It is noon.", "It is noon.", []),
        ("I look. " + wrapped(WEATHER), "I look. ", ["weather"]),
        (wrapped(WEATHER, TIME), "", ["weather", "time"]),
        (f"a {wrapped(WEATHER)} b", "a  b", ["weather"]),
        (wrapped(WEATHER) + "<tool_call>cut", "<tool_call>cut", ["weather"]),
        (wrapped('{"name": "f", "arguments": null}'), "", ["f"]),
        (wrapped('{"name": "f", "arguments": {"x": "} </tool_call>"}}'), "", ["f"]),
        (wrapped('{"name": "f", "arguments": {"x": "a <tool_call> b"}}'), "", ["f"]),
        ("<tool_call>oops</tool_call>", "<tool_call>oops</tool_call>", []),
        ("a < b <tool", "a < b <tool", []),
        (wrapped("{broken}"), wrapped("{broken}"), []),
    ],
)
def test_calls_are_separated_from_text(text, content, names):
    drawn = random.Random(2)
    for _ in range(30):
        found = ToolText()
        certain = ""
        rest = text
        while rest:
            size = drawn.randint(1, 9)
            certain += found.put(rest[:size])
            rest = rest[size:]
        last, calls = found.finish()
        assert certain + last == content
        assert [call["function"]["name"] for call in calls] == names


@pytest.mark.parametrize("streamed", [True, False])
def test_reply_has_the_calls(tokenizer, streamed):
    text = "I look. " + wrapped(WEATHER, TIME)
    reply = ChatReply("model", None, max_calls=None)
    chunks = [*reply.begin()]
    for letter in text:
        chunks += reply.piece(Piece(letter, []))
    chunks += reply.end(answer(text))
    if streamed:
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
        content = "".join(delta.get("content") or "" for delta in deltas)
        calls = deltas[-1]["tool_calls"]
        assert [call["index"] for call in calls] == [0, 1]
        finish = chunks[-1]["choices"][0]["finish_reason"]
    else:
        choice = reply.whole(answer(text))["choices"][0]
        content = choice["message"]["content"]
        calls = choice["message"]["tool_calls"]
        finish = choice["finish_reason"]
    assert content == "I look. "
    assert json.loads(calls[0]["function"]["arguments"]) == {"city": "Paris"}
    assert len({call["id"] for call in calls}) == 2
    assert finish == "tool_calls"


def test_template_gets_the_tools_as_they_were_sent(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = TEMPLATE
    plan = make_plan(demo_shape(), [[0] * 8] * 6)
    requests = Requests(plan, tokenizer, 768, GenerationDefaults(), Defaults())
    function = {"name": "time", "description": "Tells the time", "strict": False}
    body = {
        "model": "x",
        "messages": [{"role": "user", "content": "Hi"}],
        "tools": [{"type": "function", "function": function}],
    }
    request = requests.of_chat(ChatBody.parse(json.dumps(body).encode()))
    shown = '[{"type": "function", "function": {"name": "time", "description": "Tells the time"}}]'
    assert tokenizer.decode(request.ids).startswith(shown)


def test_templates_that_ask_for_calls_are_known(tokenizer):
    assert not knows_tools(tokenizer)
    tokenizer.chat_template = "{{ messages[0].content }}"
    assert not knows_tools(tokenizer)
    tokenizer.chat_template = TEMPLATE
    assert knows_tools(tokenizer)


def test_messages_of_tools_reach_the_template():
    call = {"id": "1", "function": {"name": "f", "arguments": '{"x": 1}'}}
    message = Message.model_validate({"role": "assistant", "content": None, "tool_calls": [call]})
    assert message.for_template() == {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
        ],
    }
    result = {"role": "tool", "content": "21", "tool_call_id": "1"}
    assert Message.model_validate(result).for_template() == result
