"""The thread that loads the model and answers requests, one after the other.

CUDA graphs and the CPU's threads belong to the thread that uses the model.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from transformers import PreTrainedTokenizerBase

from fiddler_run.errors import FiddlerError
from fiddler_run.generation.answer import Answer, Piece, Request, answer
from fiddler_run.generation.model import PlannedModel

Event = Piece | Answer | Exception
Load = Callable[[Callable[[int], None]], PlannedModel]


class QueueFullError(Exception):
    """As many requests as allowed wait already."""


class _ClosingError(Exception):
    """Ends the loading of a model that nobody will use."""


@dataclass(eq=False)
class Job:
    """A request, and who is told about its answer: pieces, then an answer or an exception."""

    request: Request
    tell: Callable[[Event], None]
    cancelled: threading.Event = field(default_factory=threading.Event)


class Worker:
    """Loads a model, then answers requests in the order in which they came.

    `state` says how far it is, `loaded_bytes` how much of the experts is loaded. `error` is what
    ended it. `running` is the job that is being answered, and `last` the last answer.
    """

    def __init__(self, load: Load, tokenizer: PreTrainedTokenizerBase, max_waiting: int):
        self.state: Literal["loading", "ready", "failed"] = "loading"
        self.loaded_bytes = 0
        self.error: Exception | None = None
        self.model: PlannedModel | None = None
        self.running: Job | None = None
        self.last: Answer | None = None
        self._load = load
        self._tokenizer = tokenizer
        self._max_waiting = max_waiting
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def start(self) -> None:
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Queues a job.

        Raises:
            QueueFullError: too many wait already.
        """
        with self._changed:
            if len(self._waiting) >= self._max_waiting:
                raise QueueFullError
            self._waiting.append(job)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Ends a job: at once if it waits, else after its next token."""
        job.cancelled.set()
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)

    def stop(self) -> None:
        """Ends all jobs, or loading. Does not wait for it."""
        with self._changed:
            self._closing = True
            for job in self._waiting:
                job.tell(FiddlerError("the server is ending"))
            self._waiting.clear()
            if self.running is not None:
                self.running.cancelled.set()
            self._changed.notify()

    def join(self) -> None:
        """Waits until the thread has ended."""
        self._thread.join()

    def _run(self) -> None:
        try:
            self.model = self._load(self._count)
        except _ClosingError:
            return
        except Exception as error:
            self.error = error
            self.state = "failed"
            return
        self.state = "ready"
        while (job := self._next()) is not None:
            self._answer(job)

    def _count(self, loaded_bytes: int) -> None:
        if self._closing:
            raise _ClosingError
        self.loaded_bytes += loaded_bytes

    def _next(self) -> Job | None:
        """Waits for a job. None once the worker is closing."""
        with self._changed:
            self.running = None
            self._changed.wait_for(lambda: self._waiting or self._closing)
            if self._closing:
                return None
            self.running = self._waiting.popleft()
            return self.running

    def _answer(self, job: Job) -> None:
        try:
            found = answer(self.model, self._tokenizer, job.request, job.tell, job.cancelled)
        except FiddlerError as error:
            job.tell(error)
        except Exception as error:
            logging.getLogger("fiddler_run").exception("a request failed")
            job.tell(error)
        else:
            self.last = found
            job.tell(found)
