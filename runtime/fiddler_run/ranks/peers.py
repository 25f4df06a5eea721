"""The other ranks as rank 0 sees them: tells them what to do, and notices when one fails."""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import Empty, SimpleQueue

import torch
from torch import Tensor

from fiddler_run.command import ends_at_once
from fiddler_run.errors import FiddlerError
from fiddler_run.ranks.exchange import Exchange, Inputs
from fiddler_run.ranks.peer import Peer
from fiddler_run.ranks.processes import end_processes, exit_without

# How long rank 0 may take to notice a failure by itself, before its process is ended.
LEAVE_S = 5
POLL_S = 0.2


class Peers:
    """All other ranks. Tensors go through `exchange`.

    `failure` is the line that says why the ranks cannot go on, or None. `loaded_bytes` counts the
    experts that others have loaded. `has_gpu`: True if any of them uses a GPU.
    """

    def __init__(self, peers: list[Peer]):
        self.failure: str | None = None
        self.exchange: Exchange | None = None
        self.loaded_bytes = 0
        self.has_gpu = False
        self._peers = peers
        self._replies: dict[int, SimpleQueue] = {peer.rank: SimpleQueue() for peer in peers}
        self._requests = 0
        self._closing = False
        self._state = threading.Lock()  # guards `failure` and `loaded_bytes`
        self._busy = False  # this process may wait for another rank, where nothing interrupts it
        self._raised = threading.Event()  # the failure was raised
        for peer in peers:
            threading.Thread(target=self._listen, args=(peer,), daemon=True).start()

    @contextmanager
    def layer(self, number: int, inputs: Inputs) -> Iterator[None]:
        """Lets all ranks compute a layer's experts. One thread at a time may do so.

        Raises:
            FiddlerError: a rank has failed.
        """
        self.begin(number, inputs)
        try:
            yield
        except BaseException:
            self.abandon()
            raise
        self.end()

    def begin(self, number: int, inputs: Inputs, recorded: bool = False) -> None:
        """Tells the others that the inputs of a layer follow.

        Args:
            recorded: rank 0 has recorded the layer for batches of this size; the others may, too.

        Raises:
            FiddlerError: a rank has failed.
        """
        self.check_failure()
        self._busy = True
        tokens, k = inputs.index.shape
        self.tell(do="layer", layer=number, tokens=tokens, k=k, recorded=recorded)

    def end(self) -> None:
        """The exchange of a layer is queued or done."""
        self._busy = False

    def abandon(self) -> None:
        """Ends the ranks if a layer was not finished: they would not agree on the next one."""
        unfinished = self._busy
        self._busy = False  # the caller no longer waits for another rank
        if unfinished and self.failure is None:
            self._fail("a layer was interrupted, so the ranks have ended; load the model again")

    def broadcast(self, inputs: Inputs) -> None:
        """Sends a layer's inputs to the others.

        Raises:
            FiddlerError: a rank has failed.
        """
        with self._naming_failures():
            self.exchange.broadcast(inputs)

    def reduce(self, partial: Tensor, dtype: torch.dtype) -> Tensor:
        """The sum of all ranks' partial sums; see `Exchange.reduce`.

        Raises:
            FiddlerError: a rank has failed.
        """
        with self._naming_failures():
            return self.exchange.reduce(partial, dtype)

    @contextmanager
    def connecting(self) -> Iterator[None]:
        """While the exchange is being connected, which nothing can interrupt."""
        self._busy = True
        with self._naming_failures():
            yield
        self._busy = False

    def check_failure(self) -> None:
        """Checks that no rank has failed.

        Raises:
            FiddlerError: one has.
        """
        if self.failure is not None:
            self._raised.set()
            raise FiddlerError(self.failure)

    def tell(self, **message: object) -> None:
        """Sends a message to all others."""
        for peer in self._peers:
            peer.connection.send(**message)

    def request(self, **message: object) -> int:
        """Sends a message to all others that they reply to. Returns its number, for `replies`.

        Raises:
            FiddlerError: a rank has failed.
        """
        self.check_failure()
        self._requests += 1
        self.tell(request=self._requests, **message)
        return self._requests

    def replies(
        self, request: int | None = None, meanwhile: Callable[[], None] = lambda: None
    ) -> list[dict]:
        """Waits for one reply of each to a request, in the order of the ranks.

        Args:
            request: its number. None: they report without a request.
            meanwhile: called now and then.

        Raises:
            FiddlerError: a rank has failed.
        """
        return [self._reply(peer, request, meanwhile) for peer in self._peers]

    @property
    def own_address(self) -> str:
        """The address of this machine by which the others reach it."""
        return self._peers[0].connection.own_address

    def close(self) -> None:
        """Lets the others end, and waits for those that were started here."""
        if self._closing:
            return
        self._closing = True
        in_step = self.failure is None and not self._busy
        self.tell(do="end")
        for peer in self._peers:
            peer.connection.close()
        started_here = [peer.process for peer in self._peers if peer.process is not None]
        end_processes(started_here, LEAVE_S if in_step else 0)

    def _reply(self, peer: Peer, request: int | None, meanwhile: Callable[[], None]) -> dict:
        while True:
            self.check_failure()
            meanwhile()
            try:
                reply = self._replies[peer.rank].get(timeout=POLL_S)
            except Empty:
                continue
            if reply.get("request") == request:  # an interrupted wait leaves older ones
                return reply

    def _listen(self, peer: Peer) -> None:
        while (message := peer.connection.receive()) is not None:
            if "loaded_bytes" in message:
                with self._state:
                    self.loaded_bytes += message["loaded_bytes"]
            elif "failed" in message:
                self._fail(f"{peer.name}: {message['failed']}")
            else:
                self._replies[peer.rank].put(message)
        if not self._closing and self.failure is None:
            self._fail(f"{peer.name} {peer.ending()}")

    def _fail(self, failure: str) -> None:
        """Ends the other ranks, and lets this one notice it."""
        with self._state:
            if self.failure is not None:
                return
            ends_at_once.set()
            try:
                # before anyone sees the failure, and may end the process
                aborting = self._start_abort()
            finally:
                self.failure = failure
                for peer in self._peers:
                    peer.end()
        threading.Thread(target=self._end_if_stuck, args=(aborting,), daemon=True).start()

    def _start_abort(self) -> threading.Thread:
        """Ends the exchange, in a thread of its own: NCCL may wait. The process waits for it."""
        abort = self.exchange.abort if self.exchange is not None else None
        aborting = threading.Thread(target=abort, daemon=True)
        aborting.start()
        atexit.register(exit_without, aborting, LEAVE_S / 2)
        return aborting

    def _end_if_stuck(self, aborting: threading.Thread) -> None:
        """Ends this process if it still waits for another rank after the end of the exchange."""
        aborting.join(LEAVE_S / 2)
        stuck = aborting.is_alive()
        if (self._busy or stuck) and not self._raised.wait(LEAVE_S / 2 if stuck else LEAVE_S):
            print(f"fiddler-run: {self.failure}", file=sys.stderr, flush=True)
            os._exit(1)

    @contextmanager
    def _naming_failures(self) -> Iterator[None]:
        """Converts an error of the exchange into the failure that has caused it."""
        try:
            yield
        except RuntimeError as error:  # gloo's and NCCL's
            deadline_s = time.monotonic() + LEAVE_S / 2
            while self.failure is None and time.monotonic() < deadline_s:
                time.sleep(POLL_S / 10)
            self._fail(f"the ranks have lost each other: {error}")
            self.check_failure()
