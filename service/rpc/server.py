"""Assembles the server of one process: start, drain, stop."""

import asyncio
import contextlib
import gc
import importlib.metadata
import logging
import os
import shutil
import signal
import time
from collections.abc import Callable, Coroutine
from multiprocessing.util import get_temp_dir
from typing import Any

import grpc
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from cifar_core.images import ImageLimits
from service import logs, metrics_http, open_files, ports
from service.core.batcher import Batcher
from service.core.decoding import Decoder
from service.core.inference import Inference, Limits
from service.core.memory import limit_heap, trim_regularly
from service.core.metrics import Metrics, Processes
from service.core.model_store import Model, ModelStore
from service.errors import StartError
from service.generated.cifar.v1 import image_classifier_pb2, image_classifier_pb2_grpc
from service.generated.inference import open_inference_pb2, open_inference_pb2_grpc
from service.rpc import classify, health, open_inference, streams
from service.rpc.calls import Calls
from service.rpc.classify import ImageClassifier
from service.rpc.connections import Connections
from service.rpc.health import Health
from service.rpc.open_inference import OpenInference
from service.rpc.receiving import Receiver
from service.rpc.security import Certificates, TokenInterceptor, Tokens
from service.settings import Settings

logger = logging.getLogger(__name__)

METHODS = frozenset(
    f"{service.full_name}/{method.name}"
    for service in (
        image_classifier_pb2.DESCRIPTOR.services_by_name["ImageClassifier"],
        open_inference_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"],
    )
    for method in service.methods
)
# Largest number of slots for receiving messages that one connection may hold.
_SLOTS_PER_CONNECTION = 8
_MAX_WAITING_TO_BE_RECEIVED = 1024
# Time that gRPC has to close its connections once every answer has been sent.
_CLOSE_SECONDS = 1.0
_GAUGE_SECONDS = 0.2
_WATCHDOG_SECONDS = 0.5
STUCK_EXIT_CODE = 70  # EX_SOFTWARE of sysexits.h


def run(
    settings: Settings, *, shares_port: bool = False, on_ready: Callable[[Callable[[], bool]], None] = lambda _: None
) -> int:
    """Serves until SIGTERM or SIGINT. Ends the process with exit code 0, or returns the code if it never served.

    Args:
        settings: All options.
        shares_port: Whether other processes listen on the same port.
        on_ready: Called in the event loop when requests are answered, with a function that says whether the engine is
            healthy.

    Raises:
        StartError: The server cannot start.
    """
    limit_heap()
    return asyncio.run(_run(settings, shares_port, on_ready))


async def _run(settings: Settings, shares_port: bool, on_ready: Callable[[Callable[[], bool]], None]) -> int:
    started = time.perf_counter()
    if not shares_port:
        ports.check_free(settings.host, settings.port)
    open_files.allow_connections(settings.max_connections)
    logging.getLogger("grpc._cython.cygrpc").addFilter(_VanishedClients())
    try:
        temporary_folder = get_temp_dir()  # of multiprocessing, for the decode processes
    except OSError as error:
        raise StartError(
            f"no temporary folder can be made ({error.strerror}): set TMPDIR to a writable folder"
        ) from error
    metrics = Metrics()
    async with contextlib.AsyncExitStack() as stack:
        # Created first, so that its processes start while the model is loaded.
        decoder = Decoder(
            settings.decoder_processes,
            ImageLimits(settings.max_image_bytes, settings.max_image_pixels),
            settings.max_decode_seconds,
            on_ended=metrics.on_decoder_ended,
        )
        stack.callback(decoder.close)
        models = _model_store(settings, metrics)
        batcher = _batcher(settings, models, metrics)
        inference = Inference(models, batcher, decoder, _limits(settings), metrics)
        calls = Calls(metrics, _receiver(settings, metrics), Connections())
        tokens = Tokens(settings.token_file) if settings.token_file else None
        certificates = _certificates(settings)
        server = _server(settings, metrics, tokens, shares_port)
        statuses = Health((classify.SERVICE, open_inference.SERVICE))
        _register(server, calls, inference, statuses)
        port = _listen(server, settings, certificates)
        metrics.registry.register(Processes(lambda: {"server": os.getpid()}))
        await stack.enter_async_context(
            metrics_http.show(metrics.registry, settings.metrics_host, settings.metrics_port)
        )
        lifecycle = _Lifecycle(batcher, settings.max_batch_seconds)
        lifecycle.handle_signals(models)
        watches = [tokens.watch()] if tokens else []
        watches += [certificates.watch()] if certificates else []
        watches += [
            models.watch(),
            lifecycle.watch_engine(),
            _update_gauges(metrics, inference, calls),
            trim_regularly(lambda: calls.in_flight > 0),
        ]
        tasks = [asyncio.create_task(lifecycle.keep(watch)) for watch in watches]
        await server.start()
        freeze_gc()
        statuses.set_serving(True)
        model = models.current
        logger.info(
            "serving %s (%s) on %s with %d threads at %s, %s",
            model.version, model.variant, model.engine.device, settings.engine_threads,
            ports.address(settings.host, port), "TLS" if settings.tls_cert else "plaintext",
            extra={"start_seconds": round(time.perf_counter() - started, 3), "port": port},
        )  # fmt: skip
        on_ready(lifecycle.healthy)

        await lifecycle.stopping.wait()
        logger.info("stopping: accepted requests have %g s to finish", settings.grace)
        statuses.set_serving(False)
        left = await calls.drain(settings.grace)
        if left:
            logger.error("stopped with %d requests unanswered after %g s", left, settings.grace)
        else:
            await calls.hold_new_calls()
        statuses.end_watches()
        await _close(server, calls, at_once=left > 0)
        for task in tasks:
            task.cancel()
    logger.info("stopped", extra={"answered": calls.answered, "unanswered": left})
    # `os._exit` skips Python's normal shutdown, which waits for threads that may still compute or load a model.
    shutil.rmtree(temporary_folder, ignore_errors=True)
    logs.close()
    os._exit(lifecycle.exit_code)


async def _close(server: grpc.aio.Server, calls: Calls, *, at_once: bool) -> None:
    """Closes all connections. Clients learn that theirs takes no more calls before their held calls are refused."""
    closing = asyncio.create_task(server.stop(0 if at_once else _CLOSE_SECONDS))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    calls.refuse_held_calls()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(2 * _CLOSE_SECONDS):
            await closing


def freeze_gc() -> None:
    """Exempts all objects that exist now from garbage collection, which would otherwise scan them again and again.

    No thread runs Python code during a scan, which delays the slowest requests (docs/performance.md).
    """
    gc.collect()
    gc.freeze()


class _VanishedClients(logging.Filter):
    """Drops the record that gRPC logs, with a traceback, for each client that vanishes while it is being answered."""

    def filter(self, record: logging.LogRecord) -> bool:
        """False for such a record."""
        return not str(record.msg).startswith("ExecuteBatchError raised in core")


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


def _model_store(settings: Settings, metrics: Metrics) -> ModelStore:
    def on_reload(model: Model | None) -> None:
        metrics.on_reload(model is not None)
        if model is not None:
            metrics.on_model(model.version, model.variant, model.engine.device, model.sha256)

    models = ModelStore(
        settings.model,
        settings.variant,
        device=settings.device,
        threads=settings.engine_threads,
        max_batch_size=settings.max_batch_size,
        on_reload=on_reload,
    )
    model = models.current
    metrics.on_model(model.version, model.variant, model.engine.device, model.sha256)
    return models


def _limits(settings: Settings) -> Limits:
    return Limits(
        ImageLimits(settings.max_image_bytes, settings.max_image_pixels),
        settings.max_images,
        settings.max_message_bytes,
        settings.max_queued_images,
    )


def _batcher(settings: Settings, models: ModelStore, metrics: Metrics) -> Batcher:
    return Batcher(
        max_batch_size=settings.max_batch_size,
        max_queue_delay=settings.max_queue_delay_ms / 1000,
        max_images=settings.max_queued_images,
        max_bytes=settings.max_queued_bytes,
        observer=metrics,
        threads=models.current.engine.parallel,
    )


def _receiver(settings: Settings, metrics: Metrics) -> Receiver:
    slots = settings.receiving_slots
    return Receiver(
        slots=slots,
        per_connection=min(slots, _SLOTS_PER_CONNECTION),
        max_waiting=_MAX_WAITING_TO_BE_RECEIVED,
        seconds=settings.receive_timeout,
        on_timeout=metrics.on_receive_timeout,
    )


async def _update_gauges(metrics: Metrics, inference: Inference, calls: Calls) -> None:
    while True:
        metrics.in_flight.set(calls.in_flight)
        inference.update_gauges()
        await asyncio.sleep(_GAUGE_SECONDS)


def _server(settings: Settings, metrics: Metrics, tokens: Tokens | None, shares_port: bool) -> grpc.aio.Server:
    def on_refused(method: str) -> None:
        # Names of methods that do not exist must not become labels of the metrics.
        name = method.strip("/")
        metrics.on_request(name if name in METHODS else "other", grpc.StatusCode.UNAUTHENTICATED.name, 0.0)

    interceptors = [TokenInterceptor(tokens, settings.health_without_token, on_refused)] if tokens else []
    return grpc.aio.server(
        interceptors=interceptors,
        options=[
            ("grpc.so_reuseport", int(shares_port)),
            ("grpc.max_receive_message_length", settings.max_message_bytes),
            ("grpc.max_send_message_length", -1),
            ("grpc.max_concurrent_streams", settings.max_concurrent_streams),
            ("grpc.max_allowed_incoming_connections", settings.max_connections),
            ("grpc.max_connection_age_ms", int(settings.max_connection_age * 1000)),
            ("grpc.max_connection_age_grace_ms", int(settings.grace * 1000)),
            ("grpc.max_connection_idle_ms", 300_000),
            ("grpc.server_handshake_timeout_ms", 10_000),
            # These limit what a stream may hold before its message is read; see service.rpc.receiving.
            ("grpc.http2.bdp_probe", 0),
            ("grpc.http2.lookahead_bytes", 16_384),
            # These find and close connections whose other end has vanished. Clients may ping, too, every ten seconds.
            ("grpc.keepalive_time_ms", 60_000),
            ("grpc.keepalive_timeout_ms", 20_000),
            ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
            ("grpc.keepalive_permit_without_calls", 1),
        ],
    )


def _register(server: grpc.aio.Server, calls: Calls, inference: Inference, statuses: Health) -> None:
    max_images = inference.limits.max_images
    classifier = ImageClassifier(inference)
    calls.register(
        server,
        image_classifier_pb2_grpc.add_ImageClassifierServicer_to_server,
        classifier,
        counters=dict.fromkeys(("Classify", "ClassifyStream"), classify.field_counter(max_images)),
        streams={
            "ClassifyStream": streams.request_stream(
                calls, classify.CLASSIFY_STREAM, classifier.ClassifyStream, classify.stream_failure
            )
        },
    )
    version = importlib.metadata.version("cifar-classifier")
    calls.register(
        server,
        open_inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server,
        OpenInference(inference, lambda: calls.draining, version),
        counters={"ModelInfer": open_inference.field_counter(max_images)},
        while_draining=open_inference.ANSWERED_WHILE_DRAINING,
    )
    long_calls = streams.LongCalls()
    calls.register(
        server,
        health_pb2_grpc.add_HealthServicer_to_server,
        statuses,
        while_draining=frozenset({"Check"}),
        streams={"Watch": streams.watch(calls, long_calls, f"{health.SERVICE}/Watch", statuses.watch)},
    )
    services = (classify.SERVICE, open_inference.SERVICE, health.SERVICE, reflection.SERVICE_NAME)
    reflector = reflection.aio.ReflectionServicer(services)
    method = f"{reflection.SERVICE_NAME}/ServerReflectionInfo"
    calls.register(
        server,
        reflection_pb2_grpc.add_ServerReflectionServicer_to_server,
        reflector,
        streams={
            "ServerReflectionInfo": streams.conversation(calls, long_calls, method, reflector.ServerReflectionInfo)
        },
    )


def _certificates(settings: Settings) -> Certificates | None:
    if settings.tls_cert and settings.tls_key:
        return Certificates(settings.tls_cert, settings.tls_key, settings.tls_client_ca)
    return None


def _listen(server: grpc.aio.Server, settings: Settings, certificates: Certificates | None) -> int:
    where = ports.address(settings.host, settings.port)
    try:
        if certificates:
            return server.add_secure_port(where, certificates.credentials())
        return server.add_insecure_port(where)
    except RuntimeError as error:
        raise StartError(f"cannot listen on {where}: {error}") from error
