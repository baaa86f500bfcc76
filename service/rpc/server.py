"""Puts the rooms together: start, drain, stop."""

import asyncio
import contextlib
import gc
import importlib.metadata
import logging
import os
import signal
import time
from collections.abc import AsyncIterator, Callable

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import start_http_server

from cifar_core.images import ImageLimits
from service import ports
from service.core.batcher import Batcher
from service.core.decoding import Decoder
from service.core.inference import Inference, Limits
from service.core.metrics import Metrics, Processes
from service.core.model_store import Model, ModelStore
from service.errors import StartError
from service.generated.cifar.v1 import image_classifier_pb2, image_classifier_pb2_grpc
from service.generated.inference import open_inference_pb2, open_inference_pb2_grpc
from service.rpc import classify, open_inference
from service.rpc.calls import Calls, Registrar
from service.rpc.classify import ImageClassifier
from service.rpc.health import Health
from service.rpc.open_inference import OpenInference
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
# After the last answer was given to gRPC: to be sent.
_STOP_SECONDS = 1.0
# For clients to be told that this connection takes no more calls.
_GOAWAY_SECONDS = 0.02
_GAUGE_SECONDS = 0.2


def run(settings: Settings, *, shares_port: bool = False, on_ready: Callable[[], None] = lambda: None) -> int:
    """Serves until SIGTERM or SIGINT; returns the exit code.

    Args:
        settings: All options.
        shares_port: Other processes listen on the same port.
        on_ready: Called when requests are answered.

    Raises:
        StartError: The server cannot start.
    """
    return asyncio.run(_run(settings, shares_port, on_ready))


async def _run(settings: Settings, shares_port: bool, on_ready: Callable[[], None]) -> int:
    started = time.perf_counter()
    if not shares_port:
        ports.check_free(settings.host, settings.port)
    metrics = Metrics()
    models = _models(settings, metrics)
    calls = Calls(metrics)
    async with contextlib.AsyncExitStack() as stack:
        inference = await stack.enter_async_context(_inference(settings, models, metrics))
        tokens = Tokens(settings.token_file) if settings.token_file else None
        server = _server(settings, metrics, tokens, shares_port)
        registrar = Registrar(server)
        health = Health((classify.SERVICE, open_inference.SERVICE))
        version = importlib.metadata.version("cifar-classifier")
        image_classifier_pb2_grpc.add_ImageClassifierServicer_to_server(  # type: ignore[no-untyped-call]
            ImageClassifier(inference, calls), registrar
        )
        open_inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(  # type: ignore[no-untyped-call]
            OpenInference(inference, calls, version, settings.max_queue_delay_ms), registrar
        )
        health_pb2_grpc.add_HealthServicer_to_server(health, server)
        health_service = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
        reflection.enable_server_reflection(
            (classify.SERVICE, open_inference.SERVICE, health_service, reflection.SERVICE_NAME), server
        )
        certificates = _certificates(settings)
        port = _listen(server, settings, certificates)
        _show_metrics(settings, metrics)
        stopping = _handle_signals(models)
        watches = [asyncio.create_task(models.watch())]
        if tokens:
            watches.append(asyncio.create_task(tokens.watch()))
        if certificates:
            watches.append(asyncio.create_task(certificates.watch()))
        await server.start()
        _spare_the_collector()
        await health.serving()
        model = models.current
        logger.info(
            "serving %s (%s) on %s with %d threads at %s, %s",
            model.version, model.variant, model.engine.device, settings.engine_threads,
            ports.address(settings.host, port), "TLS" if settings.tls_cert else "plaintext",
            extra={"start_seconds": round(time.perf_counter() - started, 3), "port": port},
        )  # fmt: skip
        on_ready()

        await stopping.wait()
        logger.info("stopping: requests in flight have %g s", settings.grace)
        for watch in watches:
            watch.cancel()
        await health.enter_graceful_shutdown()
        left = await calls.drain(settings.grace)
        await health.end_watches()
        ending = asyncio.create_task(server.stop(0 if left else _STOP_SECONDS))
        await asyncio.sleep(_GOAWAY_SECONDS)
        calls.release()
        await ending
    if left:
        logger.error("stopped with %d requests unanswered after %g s", left, settings.grace)
    logger.info("stopped", extra={"answered": calls.answered, "unanswered": left})
    return 0


def _spare_the_collector() -> None:
    """What is there at the start stays: the garbage collector need not look through it again and again.

    While it looks no thread runs Python, and the slowest requests show it (docs/performance.md).
    """
    gc.collect()
    gc.freeze()


def _models(settings: Settings, metrics: Metrics) -> ModelStore:
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


@contextlib.asynccontextmanager
async def _inference(settings: Settings, models: ModelStore, metrics: Metrics) -> AsyncIterator[Inference]:
    limits = Limits(
        ImageLimits(settings.max_image_bytes, settings.max_image_pixels),
        settings.max_images,
        settings.max_message_bytes,
        settings.max_queued_images,
    )
    decoder = Decoder(settings.decoder_threads, limits.image)
    batcher = Batcher(
        max_batch_size=settings.max_batch_size,
        max_queue_delay=settings.max_queue_delay_ms / 1000,
        max_images=settings.max_queued_images,
        max_bytes=settings.max_queued_bytes,
        observer=metrics,
        threads=models.current.engine.parallel,
    )

    async def show_depth() -> None:
        while True:
            metrics.waiting.set(batcher.waiting_images)
            metrics.admitted.set(batcher.admitted_images)
            await asyncio.sleep(_GAUGE_SECONDS)

    showing = asyncio.create_task(show_depth())
    try:
        yield Inference(models, batcher, decoder, limits, metrics)
    finally:
        showing.cancel()
        decoder.close()
        await batcher.close()


def _server(settings: Settings, metrics: Metrics, tokens: Tokens | None, shares_port: bool) -> grpc.aio.Server:
    def on_refused(method: str) -> None:
        # A method of a stranger's own invention must not become a label of ours.
        name = method.strip("/")
        metrics.on_request(name if name in METHODS else "other", grpc.StatusCode.UNAUTHENTICATED.name, 0.0)

    interceptors = [TokenInterceptor(tokens, settings.health_without_token, on_refused)] if tokens else []
    return grpc.aio.server(
        interceptors=interceptors,
        options=[
            ("grpc.so_reuseport", int(shares_port)),
            ("grpc.max_receive_message_length", settings.max_message_bytes),
            ("grpc.max_send_message_length", -1),
            # Connections whose other end has vanished are found and freed; clients may look for us as often.
            ("grpc.keepalive_time_ms", 60_000),
            ("grpc.keepalive_timeout_ms", 20_000),
            ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
            ("grpc.keepalive_permit_without_calls", 1),
        ],
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


def _show_metrics(settings: Settings, metrics: Metrics) -> None:
    if settings.metrics_port is None:
        return
    metrics.registry.register(Processes(lambda: {"server": os.getpid()}))
    try:
        http, _ = start_http_server(settings.metrics_port, settings.metrics_host, metrics.registry)
    except OSError as error:
        raise StartError(
            f"--metrics-port {settings.metrics_port} of {settings.metrics_host}: {error.strerror}"
        ) from error
    logger.info("metrics at http://%s/metrics", ports.address(settings.metrics_host, http.server_port))


def _handle_signals(models: ModelStore) -> asyncio.Event:
    """The first SIGTERM or SIGINT sets the event, the second ends the process at once; SIGHUP reloads the model."""
    loop = asyncio.get_running_loop()
    stopping = asyncio.Event()

    def stop() -> None:
        stopping.set()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    reloads: set[asyncio.Task[bool]] = set()

    def reload() -> None:
        task = asyncio.create_task(models.reload())
        reloads.add(task)  # or it might be collected before its end
        task.add_done_callback(reloads.discard)

    loop.add_signal_handler(signal.SIGHUP, reload)
    return stopping
