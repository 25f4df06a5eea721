"""The server's routes."""

import hmac
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.resources import files

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from fiddler_run.generation.answer import Request as ModelRequest
from fiddler_run.plan.schema import Plan
from fiddler_run.serving import events, status
from fiddler_run.serving.bodies import Body, ChatBody, CompletionBody
from fiddler_run.serving.errors import CLIENT_LEFT, ApiError
from fiddler_run.serving.events import Answering
from fiddler_run.serving.metrics import Metrics
from fiddler_run.serving.replies import ChatReply, CompletionReply, Reply
from fiddler_run.serving.requests import Requests
from fiddler_run.serving.worker import Worker

MAX_BODY_BYTES = 4_000_000
PAGE_POLICY = (
    "default-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline';"
    " img-src 'self' data:"
)


class Server:
    """Answers HTTP requests for one model."""

    def __init__(
        self,
        plan: Plan,
        worker: Worker,
        requests: Requests,
        metrics: Metrics,
        model: str,
        api_key: str | None,
    ):
        """`model` is the name by which requests ask for the model."""
        self._plan = plan
        self._worker = worker
        self._requests = requests
        self._key = api_key
        self._metrics = metrics
        self._model = model

    def app(self, hosts: list[str]) -> Starlette:
        """The application. `hosts`: what a browser may call this server."""
        public = [Route("/", self.page), Route("/health", self.health)]
        guarded = {
            "/status": self.status,
            "/plan": self.plan,
            "/experts": self.experts,
            "/metrics": self.metrics,
            "/v1/models": self.models,
            "/v1/models/{name:path}": self.one_model,
        }
        posts = {"/v1/chat/completions": self.chat, "/v1/completions": self.completion}
        return Starlette(
            routes=[
                *public,
                *(Route(path, self._guarded(each)) for path, each in guarded.items()),
                *(
                    Route(path, self._guarded(each), methods=["POST"])
                    for path, each in posts.items()
                ),
            ],
            exception_handlers={
                ApiError: _as_openai,
                HTTPException: _http_error,
                Exception: _unexpected,
            },
            middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False)],
        )

    def _guarded(self, endpoint: Callable) -> Callable:
        """The endpoint, for those who know the key."""

        async def guarded(request: HttpRequest) -> Response:
            if self._key is not None:
                scheme, _, given = request.headers.get("authorization", "").partition(" ")
                is_known = hmac.compare_digest(given.encode("latin-1"), os.fsencode(self._key))
                if scheme.lower() != "bearer" or not is_known:
                    raise ApiError(401, "send the server's key: Authorization: Bearer KEY")
            return await endpoint(request)

        return guarded

    async def page(self, _: HttpRequest) -> Response:
        content = files("fiddler_run.serving").joinpath("page.html").read_text()
        return HTMLResponse(content, headers={"Content-Security-Policy": PAGE_POLICY})

    async def health(self, _: HttpRequest) -> Response:
        found = status.progress(self._plan, self._worker)
        return JSONResponse(found, 200 if self._worker.state == "ready" else 503)

    async def status(self, _: HttpRequest) -> Response:
        return JSONResponse(status.status(self._plan, self._worker))

    async def plan(self, _: HttpRequest) -> Response:
        return JSONResponse(status.about(self._plan, self._model, self._requests.can_chat))

    async def experts(self, _: HttpRequest) -> Response:
        return JSONResponse(status.calls(self._plan, self._worker))

    async def metrics(self, _: HttpRequest) -> Response:
        self._metrics.waiting.set(self._worker.num_waiting)
        self._metrics.running.set(self._worker.running is not None)
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4")

    async def models(self, _: HttpRequest) -> Response:
        return JSONResponse({"object": "list", "data": [self._about_model()]})

    async def one_model(self, request: HttpRequest) -> Response:
        name = request.path_params["name"]
        if name != self._model:
            raise ApiError(404, f"{name!r} is not served here; {self._model!r} is")
        return JSONResponse(self._about_model())

    async def chat(self, request: HttpRequest) -> Response:
        with self._counting_refusals():
            body = await run_in_threadpool(ChatBody.parse, await read(request))
            answering = await self._queued(request, body, self._requests.of_chat)
        make = partial(ChatReply, max_calls=body.max_calls)
        return await self._response(answering, body, make, body.logprobs)

    async def completion(self, request: HttpRequest) -> Response:
        with self._counting_refusals():
            body = await run_in_threadpool(CompletionBody.parse, await read(request))
            answering = await self._queued(request, body, self._requests.of_completion)
        return await self._response(answering, body, CompletionReply, body.logprobs is not None)

    async def _queued(
        self, http: HttpRequest, body: Body, make: Callable[[Body], ModelRequest]
    ) -> Answering:
        """Raises ApiError if the request is refused."""
        body.require_model(self._model)
        status.require_ready(self._plan, self._worker)
        request = await run_in_threadpool(make, body)
        return Answering(self._worker, request, http, self._metrics)

    async def _response(
        self, answering: Answering, body: Body, make: Callable[..., Reply], shows_logprobs: bool
    ) -> Response:
        decode = self._requests.token_decoder() if shows_logprobs else None
        reply = make(self._model, decode)
        if body.stream:
            chunks = events.stream(answering, reply, body.stream_options.include_usage)
            return StreamingResponse(
                chunks, media_type="text/event-stream", headers={"Cache-Control": "no-store"}
            )
        return JSONResponse(await events.whole(answering, reply))

    @contextmanager
    def _counting_refusals(self) -> Iterator[None]:
        try:
            yield
        except ApiError as error:
            self._metrics.requests.labels(error.status).inc()
            raise

    def _about_model(self) -> dict[str, object]:
        return {
            "id": self._model,
            "object": "model",
            "created": 0,
            "owned_by": "fiddler-opt",
            "max_model_len": self._plan.workload.max_seq_len,
            **status.progress(self._plan, self._worker),
        }


async def read(request: HttpRequest) -> bytes:
    """The body of a request.

    Raises:
        ApiError: it is not JSON, or too large. A page of another site can send only other types.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "send JSON: Content-Type: application/json")
    content = bytearray()
    try:
        async for part in request.stream():
            content += part
            if len(content) > MAX_BODY_BYTES:
                raise ApiError(413, f"the body is larger than {MAX_BODY_BYTES / 1e6:g} MB")
    except ClientDisconnect:
        raise ApiError(CLIENT_LEFT, "the client has left") from None
    return bytes(content)


async def _as_openai(_: HttpRequest, error: ApiError) -> Response:
    headers = {"Retry-After": "5"} if error.status in (429, 503) else {}
    return JSONResponse(error.body, error.status, headers)


async def _http_error(request: HttpRequest, error: HTTPException) -> Response:
    message = f"{request.method} {request.url.path}: {error.detail}"
    return JSONResponse(ApiError(error.status_code, message).body, error.status_code)


async def _unexpected(_: HttpRequest, __: Exception) -> Response:
    return JSONResponse(ApiError(500, "an error of the server; see its log").body, 500)
