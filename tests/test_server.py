"""The OpenAI API, by OpenAI's client against a real server of the demo model."""

import json
import signal
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from server import MODEL, serving, wait_until

MESSAGES = [{"role": "user", "content": "Once upon a time there was a bear."}]
GREEDY = {"model": MODEL, "temperature": 0, "max_tokens": 12}
SCHEMA = {
    "type": "object",
    "properties": {"size": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["size"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def client(served) -> openai.OpenAI:
    return served.client()


def chat(client: openai.OpenAI, **more: object):
    return client.chat.completions.create(**{"messages": MESSAGES, **GREEDY, **more})


def streamed_text(chunks) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def test_models_are_listed(client):
    (model,) = client.models.list()
    assert (model.id, model.max_model_len, model.state) == (MODEL, 512, "ready")
    assert client.models.retrieve(MODEL) == model
    with pytest.raises(openai.NotFoundError, match="is not served here"):
        client.models.retrieve("other/model")


def test_chat_answers_whole_and_streamed(client):
    whole = chat(client)
    choice = whole.choices[0]
    assert choice.finish_reason == "length"
    assert (choice.message.role, choice.logprobs) == ("assistant", None)
    assert whole.usage.completion_tokens == 12
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + 12
    chunks = [*chat(client, stream=True, stream_options={"include_usage": True})]
    assert streamed_text(chunks) == choice.message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].choices == []
    usage = chunks[-1].usage
    assert usage.prompt_tokens_details.cached_tokens == usage.prompt_tokens - 1
    assert not any(chunk.usage for chunk in chat(client, stream=True))


def test_messages_may_have_parts_and_all_roles(client):
    text = MESSAGES[0]["content"]
    parts = [{"type": "text", "text": text[:7]}, {"type": "text", "text": text[7:]}]
    expected = chat(client).choices[0].message.content
    found = chat(client, messages=[{"role": "user", "content": parts}])
    assert found.choices[0].message.content == expected
    roles = [("developer", "Be kind."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Go on")]
    messages = [{"role": role, "content": content} for role, content in roles]
    assert chat(client, messages=messages).usage.prompt_tokens > 10


def test_completion_continues_text_and_ids(client):
    text = "Once upon a time"
    whole = client.completions.create(prompt=text, **GREEDY)
    chunks = client.completions.create(prompt=[text], stream=True, **GREEDY)
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    by_ids = client.completions.create(prompt=[1, 300, 301], **GREEDY)
    assert by_ids.usage.prompt_tokens == 3


def test_stop_strings_end_the_answer(client):
    whole = chat(client).choices[0].message.content
    stop = whole[6:9]
    for stream in (False, True):
        cut = chat(client, stop=["never", stop], stream=stream)
        if stream:
            chunks = [*cut]
            assert streamed_text(chunks) == whole.partition(stop)[0]
            assert chunks[-1].choices[0].finish_reason == "stop"
        else:
            assert cut.choices[0].message.content == whole.partition(stop)[0]
            assert cut.choices[0].finish_reason == "stop"


def test_sampling_follows_seed_temperature_and_top_p(client):
    sampled = {"temperature": 1.5, "max_tokens": 20}
    texts = [
        chat(client, **sampled, **more).choices[0].message.content
        for more in ({"seed": 1}, {"seed": 1}, {"seed": 2}, {"seed": -3})
    ]
    assert texts[0] == texts[1]
    assert len({*texts}) > 1
    nearly_greedy = chat(client, temperature=1.5, top_p=1e-6, max_tokens=12, seed=5)
    assert nearly_greedy.choices[0].message.content == chat(client).choices[0].message.content


def test_logprobs_of_chat_and_completion(client):
    whole = chat(client, logprobs=True, top_logprobs=2).choices[0]
    tokens = whole.logprobs.content
    assert "".join(token.token for token in tokens) == whole.message.content
    for token in tokens:
        assert token.logprob == token.top_logprobs[0].logprob >= token.top_logprobs[1].logprob
        assert bytes(token.bytes).decode() == token.token
    chunks = chat(client, logprobs=True, top_logprobs=2, stream=True)
    parts = [chunk.choices[0].logprobs for chunk in chunks]
    streamed = [token for part in parts if part is not None for token in part.content]
    assert [token.token for token in streamed] == [token.token for token in tokens]
    found = client.completions.create(prompt="Once", logprobs=1, **GREEDY).choices[0]
    logprobs = found.logprobs
    assert "".join(logprobs.tokens) == found.text
    for at, token in zip(logprobs.text_offset, logprobs.tokens, strict=True):
        assert found.text[at:].startswith(token)
    assert all(len(top) == 1 for top in logprobs.top_logprobs)


def test_response_format_gives_json(client):
    of_schema = {"type": "json_schema", "json_schema": {"name": "size", "schema": SCHEMA}}
    for seed in range(3):
        found = chat(client, response_format=of_schema, temperature=1, seed=seed, max_tokens=40)
        assert found.choices[0].finish_reason == "stop"
        assert 0 <= json.loads(found.choices[0].message.content)["size"] <= 99
    anything = chat(client, response_format={"type": "json_object"}, max_tokens=5)
    assert anything.choices[0].message.content.startswith("{")


def test_second_turn_reuses_the_first(client):
    first = chat(client)
    answer = {"role": "assistant", "content": first.choices[0].message.content}
    second = chat(client, messages=[*MESSAGES, answer, {"role": "user", "content": "Go on."}])
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert first.usage.prompt_tokens - 2 <= cached < second.usage.prompt_tokens


def test_two_clients_at_once_get_the_answers_they_get_alone(served):
    prompts = ["Once upon a time", "def count(", "3 + 4 =", "One bright morning"]

    def ask(text: str) -> str:
        client = served.client()
        return "".join(
            chunk.choices[0].text
            for chunk in client.completions.create(prompt=text, stream=True, **GREEDY)
        )

    alone = [ask(text) for text in prompts]
    with ThreadPoolExecutor(4) as threads:
        assert [*threads.map(ask, prompts)] == alone


def test_status_plan_experts_and_metrics(served, client):
    before = served.get("/experts")["calls"]
    chat(client)
    after = served.get("/experts")["calls"]
    plan = served.get("/plan")
    last = served.get("/status")["last"]
    new = sum(map(sum, after)) - sum(map(sum, before))
    computed = last["prompt_tokens"] - last["reused_tokens"] + last["output_tokens"] - 1
    assert new == computed * 2 * len(plan["resident_blocks"])
    assert last["output_tokens"] == 12
    assert sum(last["bytes"].values()) > 0
    assert plan["predicted"]["decode_tokens_per_s"] > 0
    metrics = served.fetch("/metrics")[1].decode()
    assert 'fiddler_requests_total{status="200"}' in metrics
    assert "fiddler_planned_decode_tokens_per_second" in metrics
    assert 'fiddler_expert_bytes_total{resource="cpu"}' in metrics


@pytest.mark.slow
def test_server_with_a_key(monkeypatch):
    """Silent streams are kept alive, and Ctrl-C ends a busy server."""
    monkeypatch.setenv("FIDDLER_API_KEY", "right")
    often = "import fiddler_run.serving.events as events; events.PING_S = 0.001"
    with serving(key="right", first=often) as served:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer rïght"}):
            for path in ("/v1/models", "/status", "/plan", "/experts", "/metrics"):
                assert served.fetch(path, headers=headers)[0] == 401
        assert served.fetch("/")[0] == 200
        with pytest.raises(openai.AuthenticationError, match="Authorization"):
            served.client(api_key="wrong").models.list()
        client = served.client()
        assert [model.id for model in client.models.list()] == [MODEL]
        with pytest.raises(openai.BadRequestError, match="give one with --template FILE"):
            chat(client)
        body = json.dumps({**GREEDY, "prompt": "Once", "stream": True}).encode()
        key = {"Authorization": "Bearer right"}
        lines = served.fetch("/v1/completions", body, key)[1].split(b"\n\n")
        assert b": ping" in lines
        assert lines[-2:] == [b"data: [DONE]", b""]
        long = {"max_tokens": 500, "temperature": 1.5, "stream": True}
        stream = client.completions.create(model=MODEL, prompt="Once", **long)
        next(iter(stream))
        served.process.send_signal(signal.SIGINT)
        with pytest.raises(openai.APIError, match="the server is ending"):
            list(stream)
        wait_until(lambda: served.process.poll() is not None)
        assert served.process.returncode == 130
        assert "Traceback" not in served.process.stderr.read()
