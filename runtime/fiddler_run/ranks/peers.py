"""The other ranks as rank 0 sees them: tells them what to do, and notices when one fails."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from queue import Empty, SimpleQueue

from fiddler_run.errors import FiddlerError
from fiddler_run.ranks.connection import Connection
from fiddler_run.ranks.exchange import Exchange, Inputs

# How long rank 0 may take to notice a failure by itself, before its process is ended.
LEAVE_S = 5
POLL_S = 0.2


@dataclass
class Peer:
    """Another rank. `process` is its process if it was started here."""

    rank: int
    connection: Connection
    process: subprocess.Popen | None = None

    def __post_init__(self):
        self.name = f"rank {self.rank} ({self.connection.address})"

    def ending(self) -> str:
        """In words, how it has ended."""
        return "is gone" if self.process is None else ending(self.process)


class Peers:
    """All other ranks. Tensors go through `exchange`.

    `failure` is the line that says which rank has failed and why, or None. `loaded_bytes` counts
    the experts that others have loaded. `is_used` is true while a generation runs.
    """

    def __init__(self, peers: list[Peer]):
        self.failure: str | None = None
        self.exchange: Exchange | None = None
        self.loaded_bytes = 0
        self.is_used: Callable[[], bool] = lambda: False
        self._peers = peers
        self._replies: dict[int, SimpleQueue] = {peer.rank: SimpleQueue() for peer in peers}
        self._closing = False
        self._counting = threading.Lock()
        self._told = threading.Event()  # the failure was raised
        self._within_layer = False
        for peer in peers:
            threading.Thread(target=self._listen, args=(peer,), daemon=True).start()

    @contextmanager
    def layer(self, number: int, inputs: Inputs) -> Iterator[Exchange]:
        """Lets all ranks compute a layer's experts.

        Raises:
            FiddlerError: a rank has failed.
        """
        self.begin(number, inputs)
        try:
            yield self.exchange
        except RuntimeError as error:  # gloo's and NCCL's
            self._wait_for_failure()
            raise FiddlerError(self.failure or f"the ranks lost each other: {error}") from None
        except BaseException:  # an interrupt, after which the ranks are out of step
            self._abort_exchange()
            raise
        self.end()

    def begin(self, number: int, inputs: Inputs) -> None:
        """Tells the others that the inputs of a layer follow.

        Raises:
            FiddlerError: a rank has failed, or an interrupt came while a layer was exchanged.
        """
        self.check_failure()
        if self._within_layer:
            raise FiddlerError(
                "the ranks are out of step, because a layer was interrupted; load the model again"
            )
        self._within_layer = True
        self.tell(do="layer", layer=number, tokens=len(inputs.index), k=inputs.index.shape[1])

    def end(self) -> None:
        """The exchange of a layer is queued or done."""
        self._within_layer = False

    def check_failure(self) -> None:
        """Checks that no rank has failed.

        Raises:
            FiddlerError: one has.
        """
        if self.failure is not None:
            self._told.set()
            raise FiddlerError(self.failure)

    def tell(self, **message: object) -> None:
        """Sends a message to all others."""
        for peer in self._peers:
            peer.connection.send(**message)

    def replies(self, meanwhile: Callable[[], None] = lambda: None) -> list[dict]:
        """Waits for one reply of each, in the order of the ranks. Calls `meanwhile` now and then.

        Raises:
            FiddlerError: a rank has failed.
        """
        return [self._reply(peer, meanwhile) for peer in self._peers]

    def ask(self, **message: object) -> list[dict]:
        """Sends a message to all others and waits for their replies; see `replies`."""
        self.check_failure()
        self.tell(**message)
        return self.replies()

    @property
    def own_address(self) -> str:
        """The address of this machine by which the others reach it."""
        return self._peers[0].connection.own_address

    def close(self) -> None:
        """Lets the others end, and waits for those that were started here."""
        if self._closing:
            return
        self._closing = True
        in_step = self.failure is None and not self._within_layer
        self.tell(do="end")
        for peer in self._peers:
            peer.connection.close()
        started_here = [peer.process for peer in self._peers if peer.process is not None]
        end_processes(started_here, LEAVE_S if in_step else 0)

    def _reply(self, peer: Peer, meanwhile: Callable[[], None]) -> dict:
        while True:
            self.check_failure()
            meanwhile()
            try:
                return self._replies[peer.rank].get(timeout=POLL_S)
            except Empty:
                continue

    def _listen(self, peer: Peer) -> None:
        while (message := peer.connection.receive()) is not None:
            if "loaded_bytes" in message:
                with self._counting:
                    self.loaded_bytes += message["loaded_bytes"]
            elif "failed" in message:
                self._fail(f"{peer.name}: {message['failed']}")
            else:
                self._replies[peer.rank].put(message)
        if not self._closing:
            self._fail(f"{peer.name} {peer.ending()}")

    def _fail(self, failure: str) -> None:
        """Ends the other ranks, and this process if it cannot notice by itself."""
        if self.failure is not None:
            return
        self.failure = failure
        for peer in self._peers:
            peer.connection.close()
        self._abort_exchange()
        deadline_s = time.monotonic() + LEAVE_S
        while time.monotonic() < deadline_s:
            if self._told.wait(POLL_S) or not self.is_used():
                return
        print(f"fiddler-run: {failure}", file=sys.stderr, flush=True)
        os._exit(1)

    def _abort_exchange(self) -> None:
        if self.exchange is not None:  # in its own thread, because NCCL may wait
            threading.Thread(target=self.exchange.abort, daemon=True).start()

    def _wait_for_failure(self) -> None:
        """Waits until the reason for a broken exchange is known."""
        deadline_s = time.monotonic() + LEAVE_S / 2
        while self.failure is None and time.monotonic() < deadline_s:
            time.sleep(POLL_S / 10)
        self._told.set()


def ending(process: subprocess.Popen) -> str:
    """In words, how a process has ended."""
    try:
        status = process.wait(timeout=1)
    except subprocess.TimeoutExpired:
        return "closed its connection"
    if status < 0:
        return f"was ended by {signal.Signals(-status).name}"
    return f"has ended with status {status}"


def end_processes(processes: Sequence[subprocess.Popen], patience_s: float) -> None:
    """Waits for processes to end, and kills those that do not."""
    deadline_s = time.monotonic() + patience_s
    for process in processes:
        try:
            process.wait(timeout=max(0.0, deadline_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
