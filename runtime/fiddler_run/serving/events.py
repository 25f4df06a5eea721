"""Carries an answer from the model's thread to an HTTP response."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from contextlib import suppress

from starlette.requests import Request as HttpRequest

from fiddler_run.errors import FiddlerError
from fiddler_run.generation.answer import Answer, Piece, Request
from fiddler_run.generation.grammar import GrammarError
from fiddler_run.serving.errors import CLIENT_LEFT, ApiError
from fiddler_run.serving.metrics import Metrics
from fiddler_run.serving.replies import Reply
from fiddler_run.serving.worker import EndingError, Event, Job, QueueFullError, Worker

PING_S = 15.0  # proxies and clients end connections that are silent for long


class Answering:
    """A request that was queued. Ends if its client leaves."""

    def __init__(self, worker: Worker, request: Request, http: HttpRequest, metrics: Metrics):
        """Queues a request.

        Raises:
            ApiError: too many wait already, or the server is ending.
        """
        self._worker = worker
        self._http = http
        self._metrics = metrics
        self._events: asyncio.Queue[Event | None] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._job = Job(request, self._tell)
        try:
            worker.submit(self._job)
        except QueueFullError:
            raise ApiError(429, "too many requests wait already; try again later") from None
        except EndingError as error:
            raise _as_api_error(error) from None

    async def events(self) -> AsyncIterator[Piece | Answer | None]:
        """Yields pieces, then the answer. Yields None while there is nothing to send.

        Ends without an answer if the client leaves.

        Raises:
            ApiError: the request failed.
        """
        watch = asyncio.create_task(self._watch())
        status = CLIENT_LEFT
        try:
            while True:
                try:
                    event = await asyncio.wait_for(self._events.get(), PING_S)
                except TimeoutError:
                    yield None
                    continue
                if event is None:
                    return
                if isinstance(event, Answer) and event.finish == "cancelled":
                    event = EndingError()  # the client is still there
                if isinstance(event, Exception):
                    error = _as_api_error(event)
                    status = error.status
                    raise error
                if isinstance(event, Answer):
                    status = 200
                yield event
                if isinstance(event, Answer):
                    return
        finally:
            watch.cancel()
            self._worker.cancel(self._job)
            self._metrics.requests.labels(status).inc()

    def _tell(self, event: Event) -> None:
        """Called by the model's thread."""
        with suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def _watch(self) -> None:
        """Ends the events when the client leaves."""
        while (await self._http.receive())["type"] != "http.disconnect":
            pass
        self._events.put_nowait(None)


async def stream(answering: Answering, reply: Reply, with_usage: bool) -> AsyncIterator[str]:
    """Yields server-sent events."""
    try:
        for chunk in reply.begin():
            yield _data(chunk)
        async for event in answering.events():
            if event is None:
                yield ": ping\n\n"
            elif isinstance(event, Piece):
                for chunk in reply.piece(event):
                    yield _data(chunk)
            else:
                for chunk in reply.end(event):
                    yield _data(chunk)
                if with_usage:
                    yield _data(reply.usage_chunk(event))
    except ApiError as error:
        yield _data(error.body)
    except Exception as error:
        logging.getLogger("fiddler_run").exception("a reply failed")
        yield _data(_as_api_error(error).body)
    yield "data: [DONE]\n\n"


async def whole(answering: Answering, reply: Reply) -> dict[str, object]:
    """The reply to a request without a stream.

    Raises:
        ApiError: the request failed.
    """
    async for event in answering.events():
        if isinstance(event, Piece):
            reply.piece(event)
        elif isinstance(event, Answer):
            reply.end(event)
            return reply.whole(event)
    raise ApiError(CLIENT_LEFT, "the client has left")


def _as_api_error(error: Exception) -> ApiError:
    if isinstance(error, EndingError):
        return ApiError(503, str(error))
    if isinstance(error, GrammarError):
        return ApiError(400, str(error), param="response_format")
    said = str(error) if isinstance(error, FiddlerError) else "an error of the server; see its log"
    return ApiError(500, said)


def _data(chunk: dict[str, object]) -> str:
    return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"
