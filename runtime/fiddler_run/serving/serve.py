"""Starts the server."""

import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn

from fiddler_run.loading.load import ModelLoader
from fiddler_run.serving.address import Address
from fiddler_run.serving.app import Server
from fiddler_run.serving.metrics import Metrics
from fiddler_run.serving.requests import Defaults, Requests
from fiddler_run.serving.worker import Worker

MAX_WAITING = 16
END_S = 5  # how long a connection may take to end once the server is told to


class _Uvicorn(uvicorn.Server):
    """Ends if the model cannot be loaded. Reports how far it is, and once that it is loaded."""

    def __init__(
        self,
        config: uvicorn.Config,
        worker: Worker,
        on_loaded: Callable[[int], None],
        on_ready: Callable[[], None],
    ):
        super().__init__(config)
        self._worker = worker
        self._on_loaded = on_loaded
        self._on_ready = on_ready
        self._was_ready = False

    async def on_tick(self, counter: int) -> bool:
        if self._worker.state == "failed":
            self.should_exit = True
        if not self._was_ready:
            self._on_loaded(self._worker.loaded_bytes)
        if self._worker.state == "ready" and not self._was_ready:
            self._was_ready = True
            self._on_ready()
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._worker.stop()
        await super().shutdown(sockets)


@contextmanager
def _ending_on_hang_up(server: uvicorn.Server) -> Iterator[None]:
    """Lets SIGHUP end the server like SIGTERM, which uvicorn handles."""
    before = signal.getsignal(signal.SIGHUP)
    came = []

    def end(number: int, _: object) -> None:
        came.append(number)
        server.should_exit = True

    if before != signal.SIG_IGN:  # as by `nohup`
        signal.signal(signal.SIGHUP, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)
        if came:
            signal.raise_signal(signal.SIGHUP)


def serve(
    loader: ModelLoader,
    defaults: Defaults,
    address: Address,
    on_listening: Callable[[str], None],
    on_loaded: Callable[[int], None],
    on_ready: Callable[[], None],
) -> None:
    """Serves the loader's model until the process is told to end.

    `/health` and `/v1/models` answer while the model loads.

    Args:
        on_listening: takes the server's URL.
        on_loaded: takes the bytes of experts loaded so far.
        on_ready: called when the model is loaded.

    Raises:
        FiddlerError: the model cannot be loaded, or the address cannot be used.
    """
    plan = loader.plan
    tokenizer = loader.tokenizer
    metrics = Metrics(plan)
    worker = Worker(loader.load, tokenizer, MAX_WAITING, metrics.count)
    requests = Requests(plan, tokenizer, loader.vocab_size, loader.defaults, defaults)
    server = Server(plan, worker, requests, metrics, loader.short_name, address.api_key)
    config = uvicorn.Config(
        server.app(address.names),
        log_level="warning",
        timeout_graceful_shutdown=END_S,
        lifespan="off",
        ws="none",
    )
    with address.listen() as listening:
        on_listening(f"http://{address.host_in_url}:{listening.getsockname()[1]}")
        worker.start()
        try:
            running = _Uvicorn(config, worker, on_loaded, on_ready)
            with _ending_on_hang_up(running):
                running.run(sockets=[listening])
        finally:
            worker.stop()
            worker.join()
    if worker.error is not None:
        raise worker.error
