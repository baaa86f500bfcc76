"""Assembles the server of one process, over gRPC and if wanted over HTTP: start, drain, stop."""

import asyncio
import contextlib
import gc
import importlib.metadata
import logging
import os
import shutil
import signal
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Protocol

from service import logs, metrics_http, ports, tracing
from service.assembly import assemble, start_decoder
from service.certificates import Certificates
from service.core.batcher import Batcher
from service.core.inference import Inference
from service.core.memory import trim_regularly
from service.core.metrics import Metrics, Processes
from service.core.model_store import ModelStore
from service.errors import StartError
from service.receiving import Receiver
from service.rpc.server import RpcServer
from service.settings import Settings
from service.tokens import Tokens
from service.tracing import Tracing

if TYPE_CHECKING:
    from service.http.server import HttpServer

logger = logging.getLogger(__name__)

# Largest number of slots for receiving messages that one connection may hold.
_SLOTS_PER_CONNECTION = 8
_MAX_WAITING_TO_BE_RECEIVED = 1024
_GAUGE_SECONDS = 0.2
_WATCHDOG_SECONDS = 0.5
_LAST_SPANS_SECONDS = 3.0
STUCK_EXIT_CODE = 70  # EX_SOFTWARE of sysexits.h


class Transport(Protocol):
    """One way in which requests reach the server."""

    @property
    def in_flight(self) -> int:
        """Number of requests accepted whose answers have not been sent yet."""

    @property
    def answered(self) -> int:
        """Number of requests answered with OK."""

    async def start(self) -> None:
        """Accepts connections and answers requests from now on."""

    async def drain(self, grace: float) -> int:
        """Refuses new requests and waits until the answers to accepted ones are sent, at most `grace` seconds.

        Returns:
            The number of requests that are still unanswered.
        """

    async def close(self, *, at_once: bool) -> None:
        """Closes all connections; unless `at_once`, so that clients lose no request that they are sending."""


async def serve(
    settings: Settings,
    loading: Future[ModelStore],
    temporary_folder: str,
    started: float,
    on_ready: Callable[[Callable[[], bool]], None],
    *,
    shares_port: bool,
) -> int:
    """Serves until SIGTERM or SIGINT. Does not return: ends the process. Call it through service.starting.

    Args:
        settings: All options.
        loading: The models, which are being loaded.
        temporary_folder: Removed at the end.
        started: When the start began, on time.perf_counter().
        on_ready: Called when requests are answered, with a function that says whether the engine is healthy.
        shares_port: Whether other processes listen on the same port.

    Raises:
        StartError: The server cannot start.
    """
    metrics = Metrics()
    spans = tracing.start(os.environ, importlib.metadata.version("cifar-classifier"))
    async with contextlib.AsyncExitStack() as stack:
        decoder = start_decoder(settings, metrics)
        stack.callback(decoder.close)
        collect_garbage()  # while the model is loaded
        core = assemble(settings, metrics, decoder, await asyncio.wrap_future(loading))
        models, batcher, inference = core.models, core.batcher, core.inference
        lifecycle = _Lifecycle(batcher, settings.max_batch_seconds)
        tokens = Tokens(settings.token_file) if settings.token_file else None
        certificates = _certificates(settings)
        receiver = _receiver(settings, metrics)
        rpc = RpcServer(settings, inference, metrics, receiver, tokens, certificates, spans, shares_port=shares_port)
        transports: list[Transport] = [rpc]
        if settings.http_port is not None:
            http_server = _import_http()
            transports.append(
                http_server(
                    settings, inference, metrics, receiver, tokens, certificates, spans,
                    shares_port=shares_port, healthy=lifecycle.healthy, keep=lifecycle.keep,
                )
            )  # fmt: skip
        metrics.registry.register(Processes(lambda: {"server": os.getpid()}))
        await stack.enter_async_context(
            metrics_http.show(metrics.registry, settings.metrics_host, settings.metrics_port)
        )
        lifecycle.handle_signals(models)
        watches = [tokens.watch()] if tokens else []
        watches += [certificates.watch()] if certificates else []
        watches += [
            models.watch(),
            lifecycle.watch_engine(),
            _update_gauges(metrics, inference, transports),
            trim_regularly(lambda: _in_flight(transports) > 0),
        ]
        tasks = [asyncio.create_task(lifecycle.keep(watch)) for watch in watches]
        for transport in transports:
            await transport.start()
        freeze_gc()
        model = models.current
        logger.info(
            "serving %s (%s) on %s with %d threads at %s, %s",
            model.version, model.variant, model.engine.device, settings.engine_threads,
            ports.address(settings.host, rpc.port), "TLS" if settings.tls_cert else "plaintext",
            extra={"start_seconds": round(time.perf_counter() - started, 3), "port": rpc.port},
        )  # fmt: skip
        on_ready(lifecycle.healthy)

        await lifecycle.stopping.wait()
        logger.info("stopping: accepted requests have %g s to finish", settings.grace)
        left = sum(await asyncio.gather(*(transport.drain(settings.grace) for transport in transports)))
        if left:
            logger.error("stopped with %d requests unanswered after %g s", left, settings.grace)
        await asyncio.gather(*(transport.close(at_once=left > 0) for transport in transports))
        for task in tasks:
            task.cancel()
    if spans is not None:
        await _close_tracing(spans)
    answered = sum(transport.answered for transport in transports)
    logger.info("stopped", extra={"answered": answered, "unanswered": left})
    # `os._exit` skips Python's normal shutdown, which waits for threads that may still compute or load a model.
    shutil.rmtree(temporary_folder, ignore_errors=True)
    logs.close()
    os._exit(lifecycle.exit_code)


def _import_http() -> "type[HttpServer]":
    """The class of the HTTP server. A server without HTTP neither needs nor loads the packages for it."""
    try:
        from service.http.server import HttpServer
    except ModuleNotFoundError as error:
        raise StartError(
            f"--http-port needs the extra http ({error.name} is missing): pip install 'cifar-classifier[http]'"
        ) from error
    return HttpServer


async def _close_tracing(spans: Tracing) -> None:
    """Sends the last spans. A collector that does not answer delays the end of the process only for a moment."""
    try:
        async with asyncio.timeout(_LAST_SPANS_SECONDS):
            await asyncio.to_thread(spans.close)
    except TimeoutError:
        logger.warning("the last spans were not sent within %g s", _LAST_SPANS_SECONDS)


def _in_flight(transports: Sequence[Transport]) -> int:
    return sum(transport.in_flight for transport in transports)


def collect_garbage() -> None:
    """Frees the garbage of the imports, and exempts what is left from garbage collection; see `freeze_gc`."""
    gc.collect()
    gc.freeze()


def freeze_gc() -> None:
    """Exempts all objects that exist now from garbage collection, which would otherwise scan them again and again.

    No thread runs Python code during a scan, which delays the slowest requests (docs/performance.md).
    """
    gc.freeze()
    gc.enable()


class _Lifecycle:
    """When the process stops, and with which exit code."""

    def __init__(self, batcher: Batcher, max_batch_seconds: float) -> None:
        self.stopping = asyncio.Event()
        self.exit_code = 0
        self._batcher, self._max_batch_seconds = batcher, max_batch_seconds

    def healthy(self) -> bool:
        """Whether no batch has been computing for too long."""
        return self._batcher.running_seconds() <= self._max_batch_seconds

    async def keep(self, watch: Coroutine[Any, Any, None]) -> None:
        """Runs a task that lasts as long as the server does. Without it, the server is not what it should be."""
        try:
            await watch
        except Exception:
            logger.critical("a task of the server failed: the process ends, to be replaced", exc_info=True)
            self.exit_code = STUCK_EXIT_CODE
            self.stopping.set()

    async def watch_engine(self) -> None:
        """Stops the process when a batch has been computing for too long: nothing else ends such a computation."""
        while self.healthy():
            await asyncio.sleep(_WATCHDOG_SECONDS)
        logger.critical(
            "a batch has been computing for more than %g s (--max-batch-seconds): the process ends, to be replaced",
            self._max_batch_seconds,
        )
        self.exit_code = STUCK_EXIT_CODE
        self.stopping.set()

    def handle_signals(self, models: ModelStore) -> None:
        """The first SIGTERM or SIGINT stops the server, the second ends the process; SIGHUP reloads the model."""
        loop = asyncio.get_running_loop()

        def stop(number: int) -> None:
            if self.stopping.is_set():
                # Not the default action of the signal: the kernel ignores that for process 1 of a container.
                os._exit(128 + number)
            self.stopping.set()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop, number)
        reloads: set[asyncio.Task[bool]] = set()

        def reload() -> None:
            task = asyncio.create_task(models.reload())
            reloads.add(task)  # the event loop keeps only weak references to tasks
            task.add_done_callback(reloads.discard)

        loop.add_signal_handler(signal.SIGHUP, reload)


def _receiver(settings: Settings, metrics: Metrics) -> Receiver:
    slots = settings.receiving_slots
    return Receiver(
        slots=slots,
        per_connection=min(slots, _SLOTS_PER_CONNECTION),
        max_waiting=_MAX_WAITING_TO_BE_RECEIVED,
        seconds=settings.receive_timeout,
        on_timeout=metrics.on_receive_timeout,
    )


async def _update_gauges(metrics: Metrics, inference: Inference, transports: Sequence[Transport]) -> None:
    while True:
        metrics.in_flight.set(_in_flight(transports))
        inference.update_gauges()
        await asyncio.sleep(_GAUGE_SECONDS)


def _certificates(settings: Settings) -> Certificates | None:
    if settings.tls_cert and settings.tls_key:
        return Certificates(settings.tls_cert, settings.tls_key, settings.tls_client_ca)
    return None
