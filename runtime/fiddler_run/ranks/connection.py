"""Messages between rank 0 and another rank: lines of JSON over a TCP connection.

They say what to do, report progress and failures, and their end shows that a process has ended.
Tensors take another way: `exchange`.
"""

from __future__ import annotations

import json
import select
import socket
import threading
import time
from contextlib import suppress
from importlib.metadata import version

from fiddler_run.errors import FiddlerError

# A machine that no longer answers is given up after this time, like a process that has ended.
SILENT_S = 4
JOIN_S = 60  # how long rank 0 waits for the others, and they for rank 0
HELLO_S = 5  # how long someone who has connected may take to say who it is
RETRY_S = 0.2
STARTED_BY_RANK_0 = "FIDDLER_STARTED_BY_RANK_0"  # environment variable of a rank's process
MAX_LINE = 2**26  # bytes; a plan of thousands of experts takes a few megabytes


class Connection:
    """One end of a connection. `send` may be called from several threads, `receive` from one.

    `ended_normally`: rank 0 has said that this is the end.
    """

    def __init__(self, connected: socket.socket):
        connected.settimeout(None)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        _notice_silence(connected)
        self._socket = connected
        self._lines = connected.makefile("rb")
        self._sending = threading.Lock()
        self.ended_normally = False

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def own_address(self) -> str:
        """The address of this end."""
        return self._socket.getsockname()[0]

    @property
    def address(self) -> str:
        """The address of the other end."""
        return self._socket.getpeername()[0]

    def send(self, **message: object) -> bool:
        """Sends a message. False if the other end is gone; `receive` will end, too."""
        line = json.dumps(message).encode() + b"\n"
        try:
            with self._sending:
                self._socket.sendall(line)
        except OSError:
            return False
        return True

    def hello(self) -> dict | None:
        """The first message. None if it does not come soon; the connection is then of no use."""
        # a timeout of the socket would be for each of its bytes
        ending = threading.Timer(HELLO_S, self.close)
        ending.start()
        message = self.receive()
        ending.cancel()
        return message

    def receive(self) -> dict | None:
        """Waits for the next message. None once the other end is gone."""
        try:
            line = self._lines.readline(MAX_LINE)
        except (OSError, ValueError):  # ValueError: closed by another thread
            return None
        if not line.endswith(b"\n"):
            return None
        try:
            message = json.loads(line)
        except ValueError:
            return None
        return message if isinstance(message, dict) else None

    def has_ended(self, patience_s: float | None = None) -> bool:
        """True if the other end is gone, or goes within `patience_s`. None: waits for it."""
        poll = select.poll()
        poll.register(self._socket, select.POLLRDHUP)
        return bool(poll.poll(None if patience_s is None else patience_s * 1000))

    def close(self) -> None:
        """Ends the connection. The other end and a thread in `receive` notice it."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def connect(host: str, port: int, patience_s: float) -> Connection:
    """Connects to rank 0, which may start later.

    Raises:
        FiddlerError: it does not answer within `patience_s` seconds.
    """
    deadline_s = time.monotonic() + patience_s
    while True:
        left_s = deadline_s - time.monotonic()
        try:
            return Connection(socket.create_connection((host, port), timeout=max(left_s, RETRY_S)))
        except OSError as error:
            if left_s <= RETRY_S:
                raise FiddlerError(
                    f"--join {host}:{port}: rank 0 does not answer ({error.strerror or error});"
                    " start it with the same address at --listen, and let its firewall pass"
                ) from None
        time.sleep(RETRY_S)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens at this address alone.

    Raises:
        FiddlerError: the address cannot be used.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        raise FiddlerError(
            f"--listen {host}:{port}: {error.strerror or error}; give an address of this machine"
            " and a free port"
        ) from None


def release() -> str:
    """What all ranks must run."""
    return f"fiddler-opt {version('fiddler-opt')}"


def _notice_silence(connected: socket.socket) -> None:
    options = [
        (socket.SOL_SOCKET, "SO_KEEPALIVE", 1),
        (socket.IPPROTO_TCP, "TCP_KEEPIDLE", 1),
        (socket.IPPROTO_TCP, "TCP_KEEPINTVL", 1),
        (socket.IPPROTO_TCP, "TCP_KEEPCNT", SILENT_S - 1),
        (socket.IPPROTO_TCP, "TCP_USER_TIMEOUT", SILENT_S * 1000),
    ]
    for level, name, value in options:
        if hasattr(socket, name):
            connected.setsockopt(level, getattr(socket, name), value)
