"""Starts the ranks of this machine and waits for those on others to connect."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from fiddler_run.errors import FiddlerError
from fiddler_run.ranks.connection import (
    JOIN_S,
    STARTED_BY_RANK_0,
    Connection,
    listen,
    release,
)
from fiddler_run.ranks.peer import Peer
from fiddler_run.ranks.peers import LEAVE_S, Peers
from fiddler_run.ranks.processes import end_processes, ending

POLL_S = 0.1
LOOPBACK = "127.0.0.1"
ANY_ADDRESS = ("0.0.0.0", "::", "")


@dataclass
class Gathering:
    """Ranks that are expected: `processes` were started here, `peers` have said who they are."""

    num_ranks: int
    listening: socket.socket
    processes: dict[int, subprocess.Popen] = field(default_factory=dict)
    peers: dict[int, Peer] = field(default_factory=dict)

    @property
    def missing(self) -> list[int]:
        return [rank for rank in range(1, self.num_ranks) if rank not in self.peers]


def start_ranks(
    machines: Sequence[int],
    address: tuple[str, int] | None,
    task: dict[str, object],
    module: str = "fiddler_run",
    waiting: Callable[[str], None] = lambda _: None,
) -> Peers:
    """Starts the other ranks on this machine, and waits for those on others.

    Args:
        machines: the number of each rank's machine.
        address: where to listen. None: only this machine's ranks can connect.
        task: what the others need to know.
        module: what a rank of this machine runs.
        waiting: called with a line to show while other machines have yet to connect.

    Raises:
        FiddlerError: a rank does not connect, or runs another release.
    """
    if address is not None and address[0] in ANY_ADDRESS:
        raise FiddlerError(
            f"--listen {address[0]}: give the address by which the other machines reach this one"
        )
    elsewhere = [rank for rank, machine in enumerate(machines) if machine != machines[0]]
    named = ", ".join(map(str, elsewhere))
    if elsewhere and address is None:
        raise FiddlerError(
            f"the plan has ranks on other machines ({named}): give --listen with an address of this"
            " machine and a port, and run `fiddler-run --join ADDRESS:PORT --rank N` for each of"
            " them there"
        )
    with listen(*(address or (LOOPBACK, 0))) as listening:
        gathering = Gathering(len(machines), listening)
        host, port = listening.getsockname()[:2]
        with _ending_on_error(gathering):
            for rank, machine in enumerate(machines[1:], 1):
                if machine == machines[0]:
                    gathering.processes[rank] = _start(module, host, port, rank)
            if elsewhere:
                waiting(f"waiting for ranks at {host}:{port}: {named}")
            _welcome_all(gathering, task)
            return Peers([gathering.peers[rank] for rank in sorted(gathering.peers)])


def _start(module: str, host: str, port: int, rank: int) -> subprocess.Popen:
    """Starts a rank of this machine. It ends when its connection to this process ends."""
    return subprocess.Popen(
        # -P: a folder of that name in the working directory must not shadow the module
        [sys.executable, "-P", "-m", module, "--join", f"{host}:{port}", "--rank", str(rank)],
        env={**os.environ, STARTED_BY_RANK_0: "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is for rank 0 alone
    )


def _welcome_all(gathering: Gathering, task: dict[str, object]) -> None:
    """Waits until all ranks are connected, and gives them their task."""
    deadline_s = time.monotonic() + JOIN_S
    while gathering.missing:
        readable, _, _ = select.select([gathering.listening], [], [], POLL_S)
        if readable:
            welcome(gathering, Connection(gathering.listening.accept()[0]), task)
        for number in gathering.missing:
            process = gathering.processes.get(number)
            if process is not None and process.poll() is not None:
                raise FiddlerError(f"rank {number} {ending(process)} before it connected")
        if time.monotonic() > deadline_s and gathering.missing:
            missing = ", ".join(map(str, gathering.missing))
            raise FiddlerError(
                f"rank {missing} did not connect within {JOIN_S} s; run `fiddler-run --join"
                " ADDRESS:PORT --rank N` there with the address of --listen, and let the"
                " firewalls pass"
            )


def welcome(gathering: Gathering, connection: Connection, task: dict[str, object]) -> None:
    """Gives a rank that has connected its task. Others are left alone.

    Raises:
        FiddlerError: it runs another release, or is not expected.
    """
    hello = connection.hello()
    if hello is None or "release" not in hello:  # not a rank; ports are also scanned
        connection.close()
        return
    rank = hello.get("rank")
    problem = None
    if hello["release"] != release():
        problem = (
            f"rank {rank} ({connection.address}) runs {hello['release']}, and rank 0"
            f" {release()}; install the same on both"
        )
    elif rank not in gathering.missing:
        problem = f"{connection.address} connected as rank {rank}, which this plan does not expect"
    if problem is not None:
        connection.send(failed=problem)
        connection.close()
        raise FiddlerError(problem)
    # before anything is sent: a rank that has ended resets the connection, which then has no
    # address
    peer = Peer(rank, connection, gathering.processes.get(rank))
    connection.send(**task)
    gathering.peers[rank] = peer


@contextmanager
def _ending_on_error(gathering: Gathering) -> Iterator[None]:
    """Ends what was started if not all ranks come together."""
    try:
        yield
    except BaseException:
        for peer in gathering.peers.values():
            peer.connection.close()
        for process in gathering.processes.values():
            process.terminate()
        end_processes([*gathering.processes.values()], LEAVE_S)
        raise
