"""The page of a real server, driven in headless Chromium."""

from collections.abc import Iterator

import pytest
from chromium import PROGRAM, Chromium, Page
from server import Served, wait_until

pytestmark = pytest.mark.skipif(not PROGRAM, reason="needs Chromium")


@pytest.fixture
def page(served: Served) -> Iterator[Page]:
    chromium = Chromium()
    opened = chromium.open(served.url)
    opened.wait("!document.querySelector('#send').disabled")
    yield opened
    chromium.close()


def ask(page: Page, text: str, tokens: int) -> None:
    page.run(f"document.querySelector('#max-tokens').value = '{tokens}'")
    page.run("document.querySelector('#input').focus()")
    page.type(text)
    page.press("Enter")


def test_page_asks_streams_stops_and_shows_the_map(served: Served, page: Page):
    assert "6 layers × 8 experts" in page.run("document.querySelector('#map').ariaLabel")
    page.run("document.querySelector('#temperature').value = '0'")
    ask(page, "Once upon a time there was a bear.", 12)
    page.wait("document.querySelector('.meta')?.textContent.includes('tokens/s')")
    first = {"role": "user", "content": "Once upon a time there was a bear."}
    alone = served.client().chat.completions.create(
        model="tiny-mixtral", messages=[first], temperature=0, max_tokens=12
    )
    assert page.text(".answer") == alone.choices[0].message.content
    assert "GB" in page.text("#bytes")
    page.run("document.querySelector('#temperature').value = '2'")
    ask(page, "Go on", 400)
    page.wait("document.querySelectorAll('.answer')[1]?.textContent.length > 10")
    page.click("#stop")
    wait_until(lambda: not served.get("/status")["running"], timeout_s=5)
    assert served.get("/status")["last"]["finish"] == "cancelled"
    urls = [each["request"]["url"] for each in page.events("Network.requestWillBeSent")]
    assert all(url.startswith((served.url, "data:")) for url in urls)
    assert page.events("Runtime.exceptionThrown") == page.events("Log.entryAdded") == []
