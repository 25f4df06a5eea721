"""Starts real servers of the demo model."""

import json
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

# with it, the demo model goes on with the messages as with a text
TEMPLATE = "{% for message in messages %}{{ message.content }} {% endfor %}"
ROOT = Path(__file__).parents[1]
MODEL = "tiny-mixtral"


@dataclass(frozen=True)
class Served:
    """A server that is ready."""

    url: str
    process: subprocess.Popen
    key: str | None = None

    def client(self, **options: object):
        """OpenAI's client of this server."""
        import openai

        usual = {"api_key": self.key or "none", "timeout": 60, "max_retries": 0}
        return openai.OpenAI(base_url=f"{self.url}/v1", **{**usual, **options})

    def get(self, path: str) -> dict:
        return json.loads(self.fetch(path)[1])

    def fetch(
        self, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, bytes]:
        """The status and the content of a response."""
        sent = {"Content-Type": "application/json"} if body is not None else {}
        request = urllib.request.Request(self.url + path, body, {**sent, **(headers or {})})
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, response.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()


@contextmanager
def serving(*flags: object, key: str | None = None, first: str = "") -> Iterator[Served]:
    """A server of the demo model with these flags, until the end of the context.

    `first`: a Python statement that it runs before it starts.
    """
    from command_line import started  # which needs conftest

    command = ("fiddler-run", "--plan", "plans/demo.yaml", "--serve", "--port", 0, *flags)
    with started(*command, cwd=ROOT, first=first) as process:
        try:
            served = Served(process.stdout.readline().strip(), process, key)
            wait_until(lambda: served.fetch("/health")[0] == 200)
            yield served
        finally:
            process.kill()


def wait_until(condition, timeout_s: float = 60) -> None:
    ends = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < ends, "timed out"
        time.sleep(0.02)


@pytest.fixture(scope="session")
def served(tmp_path_factory):
    """A server of the demo model that chats by going on with the text of all messages."""
    template = tmp_path_factory.mktemp("template") / "chat.jinja"
    template.write_text(TEMPLATE)
    with serving("--template", template) as started:
        yield started
        started.process.terminate()
        assert "Traceback" not in started.process.communicate(timeout=60)[1]
