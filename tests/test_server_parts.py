"""Parts of the server that need no model: addresses, the key, names, replies, metrics."""

from types import SimpleNamespace

import pytest
from conftest import DEMO, ROOT
from starlette.testclient import TestClient

from fiddler_run.errors import FiddlerError
from fiddler_run.generation.answer import Token
from fiddler_run.loading.load import ModelLoader
from fiddler_run.plan.schema import Plan
from fiddler_run.serving.address import Address
from fiddler_run.serving.app import Server
from fiddler_run.serving.metrics import Metrics
from fiddler_run.serving.replies import CompletionReply

PLAN = Plan.load(ROOT / "plans/demo.yaml")


def client_of(key: str | None, host: str = "127.0.0.1") -> TestClient:
    loading = SimpleNamespace(state="loading", error=None, loaded_bytes=0)
    address = Address(host, 0, key)
    app = Server(PLAN, loading, None, Metrics(PLAN), "demo", key).app(address.names)
    return TestClient(app, base_url=f"http://{address.host_in_url}")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "0.0.0.0"])
def test_the_server_answers_at_its_own_address(host):
    client = client_of(None, host)
    assert client.get("/v1/models").status_code == 200
    status = client.get("/v1/models", headers={"Host": "other.example"}).status_code
    assert status == (200 if host == "0.0.0.0" else 400)


@pytest.mark.parametrize("host", ["a..b", "x" * 70 + ".example"])
def test_no_name_of_a_host_is_refused(host):
    with pytest.raises(FiddlerError, match=f"cannot listen on {host}:1: .*; choose another"):
        Address(host, 1, "key").listen()


def test_key_is_required_on_all_routes_but_two():
    client = client_of("right")
    guarded = [route for route in client.app.routes if route.path not in ("/", "/health")]
    assert len(guarded) == 8
    for route in guarded:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "right"}):
            for method in route.methods:
                assert client.request(method, route.path, headers=headers).status_code == 401
    assert client.get("/").status_code == 200
    assert client.get("/v1/models", headers={"Authorization": "bearer right"}).status_code == 200


@pytest.mark.parametrize("key", ["right", "cl\N{LATIN SMALL LETTER E WITH ACUTE}"])
def test_a_key_of_any_letters_is_known(key):
    client = client_of(key)
    for given, status in ((key, 200), (f"{key}x", 401)):
        header = f"Bearer {given}".encode()
        found = client.get("/v1/models", headers={b"Authorization": header})
        assert found.status_code == status


def test_the_model_is_named_as_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(DEMO)
    assert ModelLoader(PLAN, ".").short_name == "tiny-mixtral"
    assert ModelLoader(PLAN, "../tiny-mixtral").short_name == "tiny-mixtral"


def test_the_most_likely_of_equal_texts_is_shown():
    """Parts of a character have the same text."""
    reply = CompletionReply("demo", lambda ids: (b"\xc3", b"\xe9", b"a")[ids])
    texts = {reply._text_of(number): number for number in (0, 1, 2)}
    assert len(texts) == 2
    tokens = [Token(2, -0.1, {2: -0.1, 0: -0.5, 1: -3.0})]
    (top,) = reply._logprobs(tokens)["top_logprobs"]
    assert sorted(top.values()) == [-0.5, -0.1]


def test_an_answer_of_one_token_has_no_speed():
    metrics = Metrics(PLAN)
    traffic = SimpleNamespace(hit_rate=0.5, bytes_by_resource=lambda _: {})
    for output_tokens, rate in ((9, 60.0), (1, 0.0)):
        measured = SimpleNamespace(
            prompt_tokens=1,
            reused_tokens=0,
            output_tokens=output_tokens,
            decode_tokens_per_s=rate,
            ttft_s=0.1,
            all_traffic=traffic,
        )
        metrics.count(SimpleNamespace(measured=measured))
    assert b"fiddler_decode_tokens_per_second 60.0" in metrics.text()
