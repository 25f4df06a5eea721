"""The server's page, driven in headless Chromium."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
from chromium import PROGRAM, Chromium, Page
from fake_server import FakeServer

pytestmark = pytest.mark.skipif(not PROGRAM, reason="needs Chromium")
IDLE = "!document.querySelector('#send').hidden"
DONE = "document.querySelector('.meta')?.textContent.includes('tokens/s')"
HOSTILE = "<img src=x onerror=document.title='taken'> & <b>bold</b>\n  two lines"
GPU = [43, 89, 195]
LINK = [227, 160, 47]
CPU = [211, 204, 187]


@pytest.fixture(scope="module")
def browser() -> Iterator[Chromium]:
    chromium = Chromium()
    yield chromium
    chromium.close()


@pytest.fixture
def fake(browser: Chromium) -> Iterator[FakeServer]:
    server = FakeServer()
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    browser.close_pages()
    server.shutdown()
    server.server_close()


def open_ready(browser: Chromium, fake: FakeServer, **options: object) -> Page:
    page = browser.open(fake.url, **options)
    page.wait("!document.querySelector('#send').disabled")
    return page


def ask(page: Page, text: str) -> None:
    page.run("document.querySelector('#input').focus()")
    page.type(text)
    page.press("Enter")


def test_asks_and_shows_the_streamed_answer(browser, fake):
    page = open_ready(browser, fake)
    page.run("document.querySelector('#system').value = 'Be brief'")
    page.run("document.querySelector('#temperature').value = '0.5'")
    ask(page, "Say hello")
    page.wait(DONE)
    assert page.text(".answer") == "Hello, world."
    assert page.text(".meta") == "12 tokens · 6.71 tokens/s"
    assert "6.71" in page.text("#speeds")
    assert "58, 40 reused" in page.text("#facts")
    assert "29.2 GB" in page.text("#bytes")
    ask(page, "Again")
    page.wait("document.querySelectorAll('.answer')[1]?.textContent === 'Hello, world.'")
    page.wait(IDLE)
    roles = [each["role"] for each in fake.requests[1]["messages"]]
    assert roles == ["system", "user", "assistant", "user"]
    assert fake.requests[1]["temperature"] == 0.5
    page.click("#new")
    assert page.run("document.querySelectorAll('.turn').length") == 0


def test_shift_enter_breaks_the_line(browser, fake):
    page = open_ready(browser, fake)
    page.type("one")
    page.press("Enter", shift=True)
    page.type("two")
    page.press("Enter")
    page.wait("document.querySelector('.question')")
    assert page.text(".question") == "one\ntwo"


def test_stop_ends_the_answer(browser, fake):
    fake.pieces = ["word "] * 1000
    page = open_ready(browser, fake)
    ask(page, "Go on")
    page.wait("document.querySelector('.answer')?.textContent.length > 20")
    page.click("#stop")
    page.wait("document.querySelector('.meta').textContent.startsWith('Stopped')")
    page.wait(IDLE)
    length = len(page.text(".answer"))
    deadline = time.monotonic() + 5
    while not fake.hung_up and time.monotonic() < deadline:
        time.sleep(0.02)
    assert fake.hung_up
    assert len(page.text(".answer")) == length < 5000


def test_follows_the_answer_unless_scrolled_up(browser, fake):
    fake.pieces = ["line\n"] * 150
    fake.delay_s = 0.005
    page = open_ready(browser, fake, height=500)
    ask(page, "Count")
    page.wait("document.querySelector('#log').scrollTop > 200")
    page.run("document.querySelector('#log').scrollTop = 10")
    page.wait(IDLE)
    assert page.run("document.querySelector('#log').scrollTop") == 10


def colour(layer: int, expert: int, part: float) -> str:
    """An expression for the colour of the map at this part of a cell's width."""
    at = f"(map.width * {expert + part}) / experts, (map.height * {layer + 0.5}) / layers"
    return f"[...map.getContext('2d').getImageData({at}, 1, 1).data].slice(0, 3)"


def test_map_shows_the_placement_and_lights_up(browser, fake):
    fake.pieces = ["word "] * 45
    page = open_ready(browser, fake)
    used = colour(16, 0, 0.5)
    unused = colour(1, 5, 0.5)
    assert page.run(used) == page.run(unused) == GPU
    assert page.run(colour(0, 0, 0.2)) == LINK
    assert page.run(colour(0, 0, 0.8)) == CPU
    ask(page, "Go")
    page.wait(f"{used}[0] < 110 && {unused}[0] > 190")
    page.wait(IDLE)
    page.wait(f"{used}[0] === {GPU[0]} && {unused}[0] === {GPU[0]}")


def test_map_describes_a_cell(browser, fake):
    page = open_ready(browser, fake)
    assert "32 layers × 8 experts" in page.run("document.querySelector('#map').ariaLabel")
    ask(page, "Go")
    page.wait(DONE)
    page.run("document.querySelector('#map').focus()")
    for key in ("ArrowDown", "ArrowDown", "ArrowRight"):
        page.press(key)
    assert page.text("#cell").startswith("Layer 1, expert 1: ")
    page.wait("document.querySelector('#cell').textContent.includes('2 tokens')")
    assert "4 in GPU memory, 12 in host memory" in page.text("#cell")


def test_continues_text_without_a_chat_template(browser, fake):
    fake.chat = False
    page = open_ready(browser, fake)
    ask(page, "Say: ")
    page.wait("document.querySelector('.meta button')")
    assert fake.requests[0]["prompt"] == "Say: "
    page.click(".meta button")
    assert page.run("document.querySelector('#input').value") == "Say: Hello, world."


def test_opens_while_the_model_loads(browser, fake):
    fake.status |= {"state": "loading", "loaded_bytes": 31e9}
    page = browser.open(fake.url)
    page.wait("document.querySelector('#progress').value === 31e9")
    assert "31.0 of 93.0 GB" in page.text("#notice")
    ask(page, "Hello")
    assert page.run("document.querySelector('#input').value") == "Hello"
    fake.status["state"] = "ready"
    page.wait("!document.querySelector('#send').disabled")
    assert page.run("document.querySelector('#banner').hidden")


def test_shows_why_loading_failed(browser, fake):
    fake.status |= {"state": "failed", "error": "layer 3 is truncated"}
    page = browser.open(fake.url)
    page.wait("document.querySelector('#notice').textContent.includes('layer 3 is truncated')")
    assert page.run("document.querySelector('#send').disabled")


def test_asks_for_the_key(browser, fake):
    fake.key = "secret"
    page = browser.open(fake.url)
    for key in ("wrong", "secret"):
        page.wait("document.querySelector('#key-dialog').open")
        page.type(key)
        page.press("Enter")
        page.wait("!document.querySelector('#key-dialog').open")
    page.wait("!document.querySelector('#send').disabled")
    ask(page, "Hello")
    page.wait(DONE)
    assert page.run("sessionStorage.key(0) + localStorage.length") == "key0"


@pytest.mark.parametrize(
    ("status", "message", "shown"),
    [
        (429, "busy", "The server's queue is full. Wait a moment"),
        (
            400,
            "5000 tokens exceed the context of 4096.",
            "5000 tokens exceed the context of 4096. ",
        ),
        (401, "no key", "The server requires an API key."),
        (500, "The GPU timed out", "The GPU timed out. Send again;"),
    ],
)
def test_errors_keep_the_text(browser, fake, status, message, shown):
    page = open_ready(browser, fake)
    fake.refusal = (status, message)
    ask(page, "My long question")
    page.wait("document.querySelector('.error')")
    assert page.text(".error").startswith(shown)
    assert page.run("document.querySelector('#input').value") == "My long question"
    fake.refusal = None
    page.run("document.querySelector('#key-dialog').close()")
    ask(page, "")
    page.wait(DONE)
    assert [len(each["messages"]) for each in fake.requests] == [1, 1]
    assert not page.run("document.querySelectorAll('.error').length")


def test_error_within_an_answer(browser, fake):
    fake.break_after = 2
    page = open_ready(browser, fake)
    ask(page, "Hello")
    page.wait("document.querySelector('.error')")
    assert page.text(".error").startswith("The GPU timed out. ")
    assert page.text(".answer") == "Hello, "


def test_says_when_the_server_is_gone(browser, fake):
    page = open_ready(browser, fake)
    fake.shutdown()
    fake.server_close()
    ask(page, "Hello")
    page.wait("document.querySelector('.error')")
    assert page.text(".error").startswith("The server does not answer.")
    assert page.run("document.querySelector('#input').value") == "Hello"
    page.wait("document.querySelector('#notice').textContent.includes('does not answer')")


def test_text_of_the_model_stays_text(browser, fake):
    fake.pieces = list(HOSTILE)
    fake.delay_s = 0.0
    page = open_ready(browser, fake, width=375, height=700)
    ask(page, HOSTILE + "x" * 300)
    page.wait(DONE)
    assert page.text(".answer") == HOSTILE
    assert page.run("document.querySelectorAll('#log img, #log b').length") == 0
    assert page.run("document.title") == "Mixtral-8x7B"
    assert page.run("document.querySelector('#log').scrollWidth") <= 375
    page.click("#toggle")
    assert page.run("document.documentElement.scrollWidth") == 375
    requests = page.events("Network.requestWillBeSent")
    urls = [each["request"]["url"] for each in requests]
    assert len(urls) > 4
    assert all(url.startswith((fake.url, "data:")) for url in urls)
    assert page.events("Runtime.exceptionThrown") == page.events("Log.entryAdded") == []
