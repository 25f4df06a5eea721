"""How a rank other than 0 joins rank 0, and tells it why it ends. Imports nothing slow."""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from fiddler_run.errors import FiddlerError
from fiddler_run.ranks.connection import STARTED_BY_RANK_0, Connection, connect, release

WAIT_S = 0.5  # how much later than the exchange the connection may end
END_S = 1  # how long a rank may take to end by itself once rank 0 has gone


@contextmanager
def joined(
    address: tuple[str, int], rank: int, patience_s: float
) -> Iterator[tuple[Connection, dict]]:
    """The connection to rank 0, and the task that it gives. Errors within are told to rank 0.

    Args:
        address: where rank 0 listens.
        patience_s: how long rank 0 may take to answer.

    Raises:
        FiddlerError: rank 0 cannot be reached, refuses this rank, or has gone.
    """
    with connect(*address, patience_s) as connection:
        connection.send(rank=rank, release=release())
        task = connection.receive()
        if task is None:
            raise FiddlerError("rank 0 is gone")
        if "failed" in task:
            raise FiddlerError(task["failed"])
        _end_with(connection)
        try:
            yield connection, task
        except FiddlerError as error:
            connection.send(failed=str(error))
            raise
        except Exception as error:
            if connection.has_ended(WAIT_S):  # an exchange that it broke off fails in many ways
                raise FiddlerError("rank 0 is gone") from None
            last = traceback.format_exception_only(error)[-1].strip()
            connection.send(failed=f"{last} (its traceback is on its stderr)")
            raise


def _end_with(connection: Connection) -> None:
    """Ends this process soon after the connection ends, even if it imports or waits for a GPU."""

    def watch() -> None:
        connection.has_ended()
        time.sleep(END_S)
        if not connection.ended_normally and STARTED_BY_RANK_0 not in os.environ:
            print("fiddler-run: rank 0 is gone", file=sys.stderr, flush=True)
        os._exit(0 if connection.ended_normally else 1)

    threading.Thread(target=watch, daemon=True).start()
