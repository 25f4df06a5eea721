"""A stand-in for the server, which holds any state and answers as it is told."""

from __future__ import annotations

import json
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from conftest import ROOT

PAGE = ROOT / "runtime" / "fiddler_run" / "serving" / "page.html"
POLICY = (
    "default-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src 'self' data:"
)
LAYERS = 32
EXPERTS = 8
PREDICTED = {
    "decode_tokens_per_s": 6.5,
    "ttft_s": 1.1,
    "gpu_hit_rate": 0.27,
    "bound_tokens_per_s": 7.4,
}
LAST = {
    "prompt_tokens": 58,
    "output_tokens": 12,
    "reused_tokens": 40,
    "ttft_s": 0.93,
    "decode_tokens_per_s": 6.71,
    "gpu_hit_rate": 0.31,
    "bytes": {"gpu_memory": 29.2e9, "link": 21.5e9, "cpu": 41.1e9},
    "finish": "stop",
}


class FakeServer(ThreadingHTTPServer):
    """Serves the page, and answers its requests as the attributes say."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/"
        self.key: str | None = None
        self.status = {"state": "ready", "error": None, "loaded_bytes": 93e9, "total_bytes": 93e9}
        self.status |= {"running": False, "waiting": 0, "last": None}
        self.calls = [[0] * EXPERTS for _ in range(LAYERS)]
        self.chat = True
        self.disk = False
        self.pieces = ["Hello", ", ", "world", "."]
        self.delay_s = 0.02
        self.refusal: tuple[int, str] | None = None  # status and message
        self.break_after: int | None = None  # pieces, then an error
        self.requests: list[dict] = []
        self.hung_up = False

    def plan(self) -> dict:
        resident = [[(3 * i * j + i) % 17 for j in range(EXPERTS)] for i in range(LAYERS)]
        disk = [[(16 - count) // 4 for count in row] for row in resident]
        return {
            "model": "Mixtral-8x7B",
            "context": 4096,
            "has_chat_template": self.chat,
            "device": "cuda",
            "blocks_per_expert": 16,
            "block_bytes": 22_020_096,
            "stream_share": 0.34,
            "predicted": PREDICTED,
            "resident_blocks": resident,
            "disk_blocks": disk if self.disk else None,
        }


class Handler(BaseHTTPRequestHandler):
    server: FakeServer

    def log_message(self, *_: object) -> None:
        pass

    def reply(self, status: int, body: bytes, kind: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Security-Policy", POLICY)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def refuse(self, status: int, message: str) -> None:
        self.reply(status, json.dumps({"error": {"message": message}}).encode())

    def allowed(self) -> bool:
        key = self.server.key
        return key is None or self.headers["Authorization"] == f"Bearer {key}"

    def do_GET(self) -> None:
        fake = self.server
        if self.path == "/":
            return self.reply(200, PAGE.read_bytes(), "text/html; charset=utf-8")
        if not self.allowed():
            return self.refuse(401, "wrong key")
        found = {"/status": fake.status, "/plan": fake.plan(), "/experts": {"calls": fake.calls}}
        if self.path not in found:
            return self.refuse(404, "no such path")
        return self.reply(200, json.dumps(found[self.path]).encode())

    def do_POST(self) -> None:
        fake = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        fake.requests.append(body)
        if not self.allowed():
            return self.refuse(401, "wrong key")
        if fake.refusal:
            return self.refuse(*fake.refusal)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            self.stream()
        except OSError:
            fake.hung_up = True
        return None

    def stream(self) -> None:
        fake = self.server
        self.send(": ping")
        for i, piece in enumerate(fake.pieces):
            if i == fake.break_after:
                return self.send('data: {"error": {"message": "The GPU timed out"}}')
            delta = {"delta": {"content": piece}} if fake.chat else {"text": piece}
            self.send("data: " + json.dumps({"choices": [delta]}))
            for layer in range(LAYERS):
                for expert in (0, 1 + i % 3):
                    fake.calls[layer][expert] += 1
            time.sleep(fake.delay_s)
        fake.status["last"] = LAST | {"ttft_s": 0.93 + len(fake.requests) / 1e4}
        self.send('data: {"choices": [], "usage": {"prompt_tokens": 58}}')
        return self.send("data: [DONE]")

    def send(self, line: str) -> None:
        self.wfile.write(line.encode() + b"\n\n")
        self.wfile.flush()
