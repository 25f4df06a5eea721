"""What the server refuses, cancels and survives."""

import json
import random
import socket
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
from command_line import started
from conftest import ROOT
from server import MODEL, Served, wait_until

CHAT = "/v1/chat/completions"
VALID = {"model": MODEL, "messages": [{"role": "user", "content": "Once"}], "max_tokens": 2}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
ODD = (
    *(None, True, 0, -1, 1e308, 2**70, "", "x", "\ud800", [], {}, [[]], {"a": 1}, "\0"),
    *([None], [{}], {"type": "x"}, [{"role": "user"}], [{"role": "king", "content": "x"}]),
)
DEEP = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "[" * 200_000}}
INCORRECT = {"name": "x", "schema": {"type": 1}}
LONG = {"model": MODEL, "prompt": "Once", "max_tokens": 500, "temperature": 1.5}


def is_idle(served: Served) -> bool:
    status = served.get("/status")
    return not status["running"] and not status["waiting"]


@pytest.mark.parametrize(
    ("change", "status", "words"),
    [
        ({"model": "other"}, 404, "model: 'other' is not served here; use 'tiny-mixtral'"),
        ({"messages": []}, 400, "messages: "),
        ({"messages": [{"role": "user", "content": "x" * 100_000}]}, 400, "the context of 512"),
        ({"messages": [{"role": "user", "content": "word " * 600}]}, 400, "the context is 512"),
        ({"max_tokens": 511}, 400, "max_tokens is 511, but the context is 512"),
        ({"temperature": 3}, 400, "temperature: Input should be less than or equal to 2"),
        ({"n": 2}, 400, "n: this value is not supported"),
        ({"presence_penalty": 0.5}, 400, "presence_penalty: this value is not supported"),
        ({"logit_bias": {"5": 1}}, 400, "logit_bias: this value is not supported"),
        ({"functions": []}, 400, "functions: this key is not supported"),
        ({"top_logprobs": 2}, 400, "top_logprobs: needs logprobs: true"),
        ({"stream_options": {}}, 400, "stream_options: needs stream: true"),
        ({"stop": [""]}, 400, "stop: "),
        ({"tools": [TOOL]}, 400, "tools: this model's chat template does not ask for calls"),
        ({"messages": [{"role": "assistant", "tool_calls": [DEEP]}]}, 200, "choices"),
        ({"tools": [TOOL], "tool_choice": "required"}, 400, "tool_choice: this value"),
        ({"response_format": {"type": "json_schema"}}, 400, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": INCORRECT}},
            400,
            "correct the schema",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            400,
            "messages.0.content: only parts of the type text are supported",
        ),
    ],
)  # fmt: skip
def test_refusals_say_where_and_what(served, change, status, words):
    found, body = served.fetch(CHAT, json.dumps({**VALID, **change}).encode())
    if status == 200:
        assert (found, words in body.decode()) == (200, True), body
        return
    error = json.loads(body)["error"]
    assert (found, words in error["message"]) == (status, True), error
    assert error.keys() == {"message", "type", "param", "code"}


def test_neutral_values_are_accepted(served):
    neutral = {
        "n": 1,
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "logit_bias": {},
        "user": "me",
        "stop": None,
        "seed": None,
        "store": False,
        "response_format": {"type": "text"},
        "tools": [TOOL],
        "tool_choice": "none",
    }
    assert served.fetch(CHAT, json.dumps({**VALID, **neutral}).encode())[0] == 200


@pytest.mark.parametrize(
    ("path", "body", "headers", "status"),
    [
        ("/nothing", None, {}, 404),
        (CHAT, None, {}, 405),
        (CHAT, b"{}", {"Content-Type": "text/plain"}, 415),
        (CHAT, b"x" * 4_000_001, {}, 413),
        ("/v1/completions", b'{"model": "tiny-mixtral", "prompt": [[-1, 2]]}', {}, 400),
        (CHAT, b'{"model": "x", "messages": [' + b"{}," * 900_000 + b"{}]}", {}, 400),
        ("/health", None, {"Host": "evil.example"}, 400),
    ],
)
def test_other_requests_are_refused(served, path, body, headers, status):
    assert served.fetch(path, body, headers)[0] == status


def fuzzed(drawn: random.Random) -> bytes:
    """A body with some odd values or bytes."""
    base = {**VALID, "stream": drawn.random() < 0.3}
    if drawn.random() < 0.4:
        base = {"model": MODEL, "prompt": "Once", "max_tokens": 2}
    keys = [*base, "stop", "seed", "top_p", "logprobs", "top_logprobs", "response_format", "tools"]
    for _ in range(drawn.randint(1, 3)):
        base[drawn.choice(keys)] = drawn.choice(ODD)
    if drawn.random() < 0.2:
        odd = {drawn.choice(["name", "x"]): drawn.choice(ODD)}
        base["messages"] = [{"role": "user", "content": "Once", **odd}, drawn.choice(ODD)]
    body = bytearray(json.dumps(base).encode())
    if drawn.random() < 0.3:
        for _ in range(drawn.randint(1, 5)):
            body[drawn.randrange(len(body))] = drawn.randrange(256)
    if drawn.random() < 0.05:
        body = bytearray(b"[" * drawn.choice([10, 100_000]))
    return bytes(body)


def test_malformed_bodies_are_refused(served):
    """Never an error of the server, and it goes on answering."""
    drawn = random.Random(1)
    found = Counter()
    for number in range(200):
        path = drawn.choice([CHAT, "/v1/completions"])
        status, body = served.fetch(path, fuzzed(drawn))
        found[status] += 1
        assert status in (200, 400, 404), (number, status, body)
        assert status == 200 or json.loads(body)["error"]["message"]
        assert b'"server_error"' not in body, (number, body)
    assert found[400] > 50
    assert served.fetch(CHAT, json.dumps(VALID).encode())[0] == 200


def stop_reading_stream(served: Served) -> None:
    stream = served.client().completions.create(**LONG, stream=True)
    next(iter(stream))
    stream.close()


def leave_plain_request(served: Served) -> None:
    body = json.dumps(LONG).encode()
    address = served.url.removeprefix("http://").split(":")
    with socket.create_connection((address[0], int(address[1]))) as connection:
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        )
        connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
        wait_until(lambda: served.get("/status")["running"])


@pytest.mark.parametrize("leave", [stop_reading_stream, leave_plain_request])
def test_client_that_leaves_frees_its_place(served, leave: Callable[[Served], None]):
    leave(served)
    wait_until(lambda: is_idle(served), timeout_s=5)
    last = served.get("/status")["last"]
    assert last["finish"] == "cancelled"
    assert last["output_tokens"] < 400
    assert served.fetch(CHAT, json.dumps(VALID).encode())[0] == 200


def test_many_requests_at_once_are_served_or_told_to_wait(served):
    client = served.client()
    expected = client.completions.create(**{**LONG, "max_tokens": 8, "temperature": 0})

    def ask(_: int) -> str:
        try:
            found = client.completions.create(**{**LONG, "max_tokens": 8, "temperature": 0})
        except openai.RateLimitError as error:
            return f"{error.body['message']}, {error.response.headers['retry-after']}"
        return found.choices[0].text

    with ThreadPoolExecutor(50) as threads:
        found = Counter(threads.map(ask, range(50)))
    refused = "too many requests wait already; try again later, 5"
    assert found.keys() <= {expected.choices[0].text, refused}
    assert found[expected.choices[0].text] >= 17
    assert found.total() == 50
    wait_until(lambda: is_idle(served))


def resident_set_bytes(served: Served) -> int:
    status = Path(f"/proc/{served.process.pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) * 1024


@pytest.mark.slow
def test_memory_stays_flat(served):
    body = json.dumps({**VALID, "max_tokens": 1}).encode()
    sizes = []
    for number in range(300):
        assert served.fetch(CHAT, body)[0] == 200
        if number % 100 == 99:
            sizes.append(resident_set_bytes(served))
    assert sizes[-1] - sizes[0] < 4_000_000, sizes


@pytest.mark.slow
def test_answers_while_loading():
    """Progress is shown, and requests are told to wait. SIGTERM ends loading."""
    slow = (
        "import time; from fiddler_run.weights.store import ExpertStore as S; place = S._place;"
        " S._place = lambda *a: (time.sleep(0.5), place(*a))[1]"
    )
    flags = ("--plan", "plans/demo.yaml", "--serve", "--port", 0)
    with started("fiddler-run", *flags, cwd=ROOT, first=slow) as process:
        other = Served(process.stdout.readline().strip(), process)
        wait_until(lambda: other.get("/status")["loaded_bytes"] > 0)
        status, body = other.fetch("/health")
        health = json.loads(body)
        assert (status, health["state"]) == (503, "loading")
        assert 0 < health["loaded_bytes"] < health["total_bytes"]
        assert next(iter(other.client().models.list())).state == "loading"
        with pytest.raises(openai.InternalServerError, match="the model is loading"):
            other.client().completions.create(**LONG)
        began = time.monotonic()
        process.terminate()
        process.communicate(timeout=30)
        assert time.monotonic() - began < 20
        assert process.returncode == -15
