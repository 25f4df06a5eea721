"""Headless Chromium, driven over the DevTools protocol through pipes."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

PROGRAM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
OPTIONS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run")
TIMEOUT_S = 10.0
KEYS = {"Enter": (13, "\r"), "ArrowRight": (39, ""), "ArrowDown": (40, ""), "Tab": (9, "")}


class Chromium:
    """A browser process; `open` gives pages that share neither storage nor cookies."""

    def __init__(self) -> None:
        self.folder = tempfile.mkdtemp(prefix="chromium-")
        command_read, self.commands = os.pipe()
        self.replies, reply_write = os.pipe()
        options = [*OPTIONS, "--remote-debugging-pipe", f"--user-data-dir={self.folder}"]
        # Chromium reads file descriptor 3 and writes 4.
        script = f'exec "$0" "$@" 3<&{command_read} 4>&{reply_write}'
        self.process = subprocess.Popen(
            ["bash", "-c", script, PROGRAM, *options],
            pass_fds=(command_read, reply_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(command_read)
        os.close(reply_write)
        self.received = b""
        self.last_id = 0
        self.events: list[dict] = []
        self.contexts: list[str] = []

    def close_pages(self) -> None:
        for context in self.contexts:
            self.call("Target.disposeBrowserContext", browserContextId=context)
        self.contexts.clear()
        self.events.clear()

    def close(self) -> None:
        os.close(self.commands)  # the browser ends with its pipe
        try:
            self.process.wait(timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.replies)
        shutil.rmtree(self.folder, ignore_errors=True)

    def call(self, method: str, session: str | None = None, **params: object) -> dict:
        """Sends a command and returns its result; events that come meanwhile are kept."""
        self.last_id += 1
        message = {"id": self.last_id, "method": method, "params": params}
        if session:
            message["sessionId"] = session
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while (reply := self.receive()).get("id") != self.last_id:
            self.events.append(reply)
        if "error" in reply:
            raise RuntimeError(f"{method}: {reply['error']['message']}")
        return reply["result"]

    def receive(self) -> dict:
        """The next message."""
        while b"\0" not in self.received:
            if not select.select([self.replies], [], [], TIMEOUT_S)[0]:
                raise TimeoutError("Chromium does not answer")
            part = os.read(self.replies, 2**20)
            if not part:
                raise RuntimeError("Chromium has ended")
            self.received += part
        message, _, self.received = self.received.partition(b"\0")
        return json.loads(message)

    def open(self, url: str, width: int = 1280, height: int = 800, **emulated: str) -> Page:
        """Opens a page in a new profile. `emulated`: media features, `_` for `-`."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        self.contexts.append(context)
        target = self.call("Target.createTarget", url="about:blank", browserContextId=context)
        attached = self.call("Target.attachToTarget", flatten=True, **target)
        page = Page(self, attached["sessionId"])
        for domain in ("Page", "Network", "Runtime", "Log"):
            page.call(f"{domain}.enable")
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        page.call("Emulation.setDeviceMetricsOverride", **size)
        features = [{"name": k.replace("_", "-"), "value": v} for k, v in emulated.items()]
        page.call("Emulation.setEmulatedMedia", features=features)
        page.call("Page.navigate", url=url)
        page.wait("document.readyState === 'complete'")
        return page


class Page:
    """A tab."""

    def __init__(self, browser: Chromium, session: str) -> None:
        self.browser = browser
        self.session = session

    def call(self, method: str, **params: object) -> dict:
        return self.browser.call(method, self.session, **params)

    def events(self, method: str) -> list[dict]:
        """The parameters of all events of this kind so far."""
        kept = self.browser.events
        mine = [each for each in kept if each.get("sessionId") == self.session]
        return [each["params"] for each in mine if each["method"] == method]

    def run(self, expression: str) -> object:
        """The JSON value of a JavaScript expression; promises are awaited."""
        reply = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in reply:
            raise RuntimeError(reply["exceptionDetails"]["exception"]["description"])
        return reply["result"].get("value")

    def wait(self, expression: str, timeout_s: float = TIMEOUT_S) -> None:
        """Evaluates the expression until it is truthy."""
        end = time.monotonic() + timeout_s
        while not self.run(f"Boolean({expression})"):
            if time.monotonic() > end:
                text = self.run("document.body.innerText")
                raise TimeoutError(f"{expression} is still false. The page says:\n{text}")
            time.sleep(0.03)

    def text(self, selector: str) -> str:
        return self.run(f"document.querySelector({selector!r}).textContent")

    def click(self, selector: str) -> None:
        """Clicks the middle of the element with the mouse."""
        x, y = self.run(
            f"(() => {{ const b = document.querySelector({selector!r}).getBoundingClientRect();"
            " return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        at = {"x": x, "y": y, "button": "left", "clickCount": 1}
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, **at)

    def type(self, text: str) -> None:
        """Types into the element that has the focus."""
        self.call("Input.insertText", text=text)

    def press(self, key: str, shift: bool = False) -> None:
        code, text = KEYS[key]
        event = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": 8 * shift}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **event)
        self.call("Input.dispatchKeyEvent", type="keyUp", **event)

    def screenshot(self, path: Path | str) -> None:
        data = self.call("Page.captureScreenshot", format="png")["data"]
        Path(path).write_bytes(base64.b64decode(data))
