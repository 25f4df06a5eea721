"""The server's routes."""

import hmac
from collections.abc import Callable
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from fiddler_run.generation.answer import Request as ModelRequest
from fiddler_run.plan.schema import Plan
from fiddler_run.serving import events, status
from fiddler_run.serving.bodies import Body, ChatBody, CompletionBody
from fiddler_run.serving.errors import ApiError
from fiddler_run.serving.events import Answering
from fiddler_run.serving.metrics import Metrics
from fiddler_run.serving.replies import ChatReply, CompletionReply, Reply
from fiddler_run.serving.requests import Requests
from fiddler_run.serving.worker import Worker

MAX_BODY_BYTES = 16_000_000
PUBLIC = {"/", "/health"}  # without a key
PAGE_POLICY = (
    "default-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline';"
    " img-src 'self' data:"
)


class Server:
    """Answers HTTP requests for one model."""

    def __init__(
        self, plan: Plan, worker: Worker, requests: Requests, tokenizer, api_key: str | None
    ):
        self._plan = plan
        self._worker = worker
        self._requests = requests
        self._tokenizer = tokenizer
        self._key = api_key
        self._metrics = Metrics(plan)
        self._model = model_name(plan)

    def app(self, hosts: list[str]) -> Starlette:
        """The application. `hosts`: what a browser may call this server."""
        routes = [
            Route("/", self.page),
            Route("/health", self.health),
            Route("/status", self.status),
            Route("/plan", self.plan),
            Route("/experts", self.experts),
            Route("/metrics", self.metrics),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.one_model),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.completion, methods=["POST"]),
        ]
        return Starlette(
            routes=[Route(r.path, self._guarded(r.endpoint), methods=r.methods) for r in routes],
            exception_handlers={ApiError: _as_openai, HTTPException: _http_error},
            middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False)],
        )

    def _guarded(self, endpoint: Callable) -> Callable:
        """The endpoint, for those who know the key."""

        async def guarded(request: HttpRequest) -> Response:
            if self._key is not None and request.url.path not in PUBLIC:
                given = request.headers.get("authorization", "").removeprefix("Bearer ")
                if not hmac.compare_digest(given.encode(), self._key.encode()):
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
        return JSONResponse(status.about(self._plan, self._model, self._tokenizer))

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
        body = self._counted(ChatBody.parse, await read(request))
        make_reply = partial(ChatReply, with_tools=body.may_call)
        return await self._answered(
            request, body, self._requests.of_chat, make_reply, body.logprobs
        )

    async def completion(self, request: HttpRequest) -> Response:
        body = self._counted(CompletionBody.parse, await read(request))
        shows_logprobs = body.logprobs is not None
        return await self._answered(
            request, body, self._requests.of_completion, CompletionReply, shows_logprobs
        )

    async def _answered(
        self,
        http: HttpRequest,
        body: Body,
        make_request: Callable[[Body], ModelRequest],
        make_reply: Callable[..., Reply],
        shows_logprobs: bool,
    ) -> Response:
        self._counted(body.require_model, self._model)
        self._counted(status.require_ready, self._plan, self._worker)
        request = await run_in_threadpool(self._counted, make_request, body)
        answering = self._counted(Answering, self._worker, request, http, self._metrics)
        reply = make_reply(self._model, self._tokenizer, shows_logprobs)
        if body.stream:
            chunks = events.stream(answering, reply, body.stream_options.include_usage)
            return StreamingResponse(
                chunks, media_type="text/event-stream", headers={"Cache-Control": "no-store"}
            )
        return JSONResponse(await events.whole(answering, reply))

    def _counted(self, step: Callable, *arguments: object) -> Any:
        """Calls a step of a request, and counts the request if the step refuses it."""
        try:
            return step(*arguments)
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


def model_name(plan: Plan) -> str:
    """The name by which requests ask for the plan's model."""
    name = plan.model.name
    return Path(name).name if name.count("/") != 1 or name.startswith((".", "/")) else name


async def read(request: HttpRequest) -> bytes:
    """The body of a request.

    Raises:
        ApiError: it is no JSON, or too large. A page of another site can send only other types.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "send JSON: Content-Type: application/json")
    content = bytearray()
    async for part in request.stream():
        content += part
        if len(content) > MAX_BODY_BYTES:
            raise ApiError(413, f"the body is larger than {MAX_BODY_BYTES / 1e6:g} MB")
    return bytes(content)


async def _as_openai(_: HttpRequest, error: ApiError) -> Response:
    headers = {"Retry-After": "5"} if error.status in (429, 503) else {}
    return JSONResponse(error.body, error.status, headers)


async def _http_error(request: HttpRequest, error: HTTPException) -> Response:
    message = f"{request.method} {request.url.path}: {error.detail}"
    return JSONResponse(ApiError(error.status_code, message).body, error.status_code)
