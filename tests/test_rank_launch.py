"""How ranks come together, what keeps them from it, and what follows the loss of one."""

import signal
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from queue import SimpleQueue

import pytest
from command_line import started
from conftest import DEMO

from fiddler_run.errors import FiddlerError
from fiddler_run.loading.share import model_id
from fiddler_run.ranks import connection
from fiddler_run.ranks import peers as peers_module
from fiddler_run.ranks.connection import Connection, connect, listen, release
from fiddler_run.ranks.launch import Gathering, start_ranks, welcome
from fiddler_run.ranks.peer import Peer
from fiddler_run.ranks.peers import Peers
from fiddler_run.weights.tensor_files import TensorFiles


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(connection, "HELLO_S", 0.3)


def refused(**hello: object) -> str:
    """The line with which ranks do not come together if one introduces itself like this."""
    addresses: SimpleQueue = SimpleQueue()
    with ThreadPoolExecutor(1) as threads:
        gathering = threads.submit(
            start_ranks, [0, 1], ("127.0.0.1", 0), {}, waiting=lambda line: addresses.put(line)
        )
        port = int(addresses.get(timeout=5).split(":")[1])
        for stranger_says in (b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01"):  # the latter half a line
            with socket.create_connection(("127.0.0.1", port)) as stranger:
                stranger.sendall(stranger_says)
                assert stranger.recv(100) == b""
        with connect("127.0.0.1", port, patience_s=5) as rank:
            rank.send(**hello)
            told = rank.receive()
        error = gathering.exception(timeout=5)
    assert isinstance(error, FiddlerError)
    assert told == {"failed": str(error)}
    return str(error)


def test_another_release_or_rank_is_refused():
    line = refused(rank=1, release="fiddler-opt 0.0.1")
    assert line.startswith(f"rank 1 (127.0.0.1) runs fiddler-opt 0.0.1, and rank 0 {release()}")
    line = refused(rank=2, release=release())
    assert line == "127.0.0.1 connected as rank 2, which this plan does not expect"


def connected() -> tuple[Connection, socket.socket]:
    """Both ends of a connection."""
    with listen("127.0.0.1", 0) as listening:
        other = socket.create_connection(listening.getsockname())
        return Connection(listening.accept()[0]), other


def test_a_stranger_that_sends_slowly_is_not_waited_for():
    connection, stranger = connected()
    over = threading.Event()

    def send() -> None:
        with suppress(OSError):
            while not over.wait(0.1):
                stranger.sendall(b" ")

    sending = threading.Thread(target=send)
    sending.start()
    begun_s = time.monotonic()
    assert connection.hello() is None
    assert time.monotonic() - begun_s < 5
    over.set()
    sending.join()
    stranger.close()


def test_a_rank_that_ends_after_its_hello_is_named():
    connection, rank = connected()
    rank.sendall(f'{{"rank": 1, "release": "{release()}"}}\n'.encode())
    rank.close()
    with listen("127.0.0.1", 0) as listening:
        gathering = Gathering(2, listening)
        welcome(gathering, connection, {"do": "nothing"})
    assert gathering.peers[1].name == "rank 1 (127.0.0.1)"


SLOW_IMPORT = """
import sys, time

class Slow:
    def find_spec(self, name, path, target=None):
        if name == "torch":
            print("importing", file=sys.stderr, flush=True)
            time.sleep(60)

sys.meta_path.insert(0, Slow())
"""


def test_a_rank_that_imports_ends_with_rank_0(tmp_path):
    """The import of PyTorch may take longer than a user waits for the end."""
    with listen("127.0.0.1", 0) as listening:
        host, port = listening.getsockname()[:2]
        joining = ("--join", f"{host}:{port}", "--rank", 1)
        rank = started("fiddler-run", *joining, cwd=tmp_path, first=f"exec({SLOW_IMPORT!r})")
        connection = Connection(listening.accept()[0])
    assert connection.receive()["rank"] == 1
    connection.send(plan="")
    assert rank.stderr.readline().startswith("connected to rank 0")
    assert rank.stderr.readline() == "importing\n"
    connection.close()
    _, stderr = rank.communicate(timeout=10)
    assert rank.returncode == 1
    assert stderr == "fiddler-run: rank 0 is gone\n"


def test_ranks_elsewhere_need_an_address():
    with pytest.raises(FiddlerError, match=r"other machines \(1, 2\): give --listen"):
        start_ranks([0, 1, 1], None, {})
    with pytest.raises(FiddlerError, match="--listen 0.0.0.0: give the address by which"):
        start_ranks([0, 1], ("0.0.0.0", 0), {})


def test_rank_0_that_does_not_answer_is_named():
    with listen("127.0.0.1", 0) as listening:
        port = listening.getsockname()[1]
    with pytest.raises(FiddlerError, match=f"--join 127.0.0.1:{port}: rank 0 does not answer"):
        connect("127.0.0.1", port, patience_s=0.1)
    with pytest.raises(FiddlerError, match=r"--listen 192.0.2.200:1: .*; give an address of this"):
        listen("192.0.2.200", 1)


def test_a_model_with_other_files_is_refused(tmp_path, model):
    """`model` is a copy of the demo's folder."""
    assert model_id(TensorFiles(model)) == model_id(TensorFiles(DEMO))
    shard = sorted(model.glob("*.safetensors"))[-1]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert model_id(TensorFiles(model)) != model_id(TensorFiles(DEMO))


def test_a_lost_rank_is_ended_and_ends_the_command_at_once(monkeypatch):
    """A process that does not end by itself is killed, as one that is stopped would be."""
    at_once = threading.Event()
    monkeypatch.setattr(peers_module, "ends_at_once", at_once)
    listening = socket.create_server(("127.0.0.1", 0))
    with socket.create_connection(listening.getsockname()) as other:
        process = subprocess.Popen(["sleep", "60"])
        peers = Peers([Peer(1, Connection(listening.accept()[0]), process)])
        assert not at_once.is_set()
        other.close()
        with pytest.raises(FiddlerError, match=r"rank 1 \(127.0.0.1\) closed its connection"):
            peers.replies()
    assert at_once.is_set()
    assert process.wait(timeout=10) == -signal.SIGKILL
    listening.close()
