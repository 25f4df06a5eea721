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

CHECK_S = 1.0  # how often an idle worker checks that the other ranks are there
Event = Piece | Answer | Exception
Load = Callable[[Callable[[int], None]], PlannedModel]


class QueueFullError(Exception):
    """As many requests as allowed wait already."""


class EndingError(Exception):
    """The server is ending, or its model has failed."""

    def __init__(self):
        super().__init__("the server is ending")


@dataclass(eq=False)
class Job:
    """A request, and who is told about its answer: pieces, then an answer or an exception."""

    request: Request
    tell: Callable[[Event], None]
    cancelled: threading.Event = field(default_factory=threading.Event)


class Worker:
    """Loads a model, then answers requests in the order in which they came.

    `loaded_bytes` counts the experts that are loaded. `running` is the job that is being answered,
    and `last` the last answer. In the state "failed", `error` says why.
    """

    def __init__(
        self,
        load: Load,
        tokenizer: PreTrainedTokenizerBase,
        max_waiting: int,
        on_answer: Callable[[Answer], None] = lambda _: None,
    ):
        """Prepares the thread.

        Args:
            load: loads the model. Takes a function to call with the bytes loaded since its last
                call.
            max_waiting: the most jobs that wait.
            on_answer: called with each answer, also of clients that left.
        """
        self.state: Literal["loading", "ready", "failed"] = "loading"
        self.loaded_bytes = 0
        self.error: BaseException | None = None
        self.model: PlannedModel | None = None
        self.running: Job | None = None
        self.last: Answer | None = None
        self._load = load
        self._tokenizer = tokenizer
        self._max_waiting = max_waiting
        self._on_answer = on_answer
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._ending = False
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
            EndingError: no job will be answered any more.
        """
        with self._changed:
            if self._ending:
                raise EndingError
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
            self._ending = True
            for job in self._waiting:
                job.tell(EndingError())
            self._waiting.clear()
            if self.running is not None:
                self.running.cancelled.set()
            self._changed.notify()

    def join(self) -> None:
        """Waits until the thread has ended."""
        self._thread.join()

    def _run(self) -> None:
        try:
            self.model = self._load(self._loaded)
            self.state = "ready"
            while (job := self._next()) is not None:
                self._answer(job)
        except EndingError:
            pass
        except BaseException as error:  # libraries in other languages raise more than Exception
            self.error = error
            self.state = "failed"
            if self.running is not None:
                self.running.tell(EndingError())
            self.stop()

    def _loaded(self, new_bytes: int) -> None:
        if self._ending:
            raise EndingError
        self.loaded_bytes += new_bytes

    def _next(self) -> Job | None:
        """Waits for a job. None once the worker is ending.

        Raises:
            FiddlerError: another rank of the model has failed.
        """
        with self._changed:
            self.running = None
            while not self._changed.wait_for(lambda: self._waiting or self._ending, CHECK_S):
                self.model.engine.resources.check_others()
            if self._ending:
                return None
            self.running = self._waiting.popleft()
            return self.running

    def _answer(self, job: Job) -> None:
        if job.cancelled.is_set():  # since it left the queue
            job.tell(EndingError())
            return
        try:
            found = answer(self.model, self._tokenizer, job.request, job.tell, job.cancelled)
        except FiddlerError as error:
            job.tell(error)
        except Exception as error:
            logging.getLogger("fiddler_run").exception("a request failed")
            job.tell(error)
        else:
            self.last = found
            self._on_answer(found)
            job.tell(found)
