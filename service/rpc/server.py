"""The gRPC server: its options, its services, and how it starts and stops."""

import asyncio
import contextlib
import importlib.metadata
import logging

import grpc
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from service import ports
from service.certificates import Certificates
from service.core.inference import Inference
from service.core.metrics import Metrics
from service.errors import StartError
from service.generated.cifar.v1 import image_classifier_pb2, image_classifier_pb2_grpc
from service.generated.inference import open_inference_pb2, open_inference_pb2_grpc
from service.receiving import Receiver
from service.rpc import classify, health, open_inference, streams
from service.rpc.calls import Calls
from service.rpc.classify import ImageClassifier
from service.rpc.connections import Connections
from service.rpc.health import Health
from service.rpc.open_inference import OpenInference
from service.rpc.security import TokenInterceptor, credentials
from service.settings import Settings
from service.tokens import Tokens
from service.tracing import Tracing

METHODS = frozenset(
    f"{service.full_name}/{method.name}"
    for service in (
        image_classifier_pb2.DESCRIPTOR.services_by_name["ImageClassifier"],
        open_inference_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"],
    )
    for method in service.methods
)
# Time that gRPC has to close its connections once every answer has been sent.
_CLOSE_SECONDS = 1.0


class RpcServer:
    """All gRPC services on one port. Create it in a running event loop.

    Args:
        settings: All options.
        inference: Answers the requests.
        metrics: Counts the calls.
        receiver: Reads the messages.
        tokens: The valid tokens; None if calls need none.
        certificates: For TLS; None for plaintext.
        tracing: Makes spans; None if tracing is off.
        shares_port: Whether other processes listen on the same port.

    Attributes:
        port: The port that it listens on.

    Raises:
        StartError: It cannot listen on the port.
    """

    def __init__(
        self,
        settings: Settings,
        inference: Inference,
        metrics: Metrics,
        receiver: Receiver,
        tokens: Tokens | None,
        certificates: Certificates | None,
        tracing: Tracing | None,
        *,
        shares_port: bool,
    ) -> None:
        logging.getLogger("grpc._cython.cygrpc").addFilter(_FaultsOfClients())
        self._calls = Calls(metrics, receiver, Connections(), tracing)
        self._server = _server(settings, metrics, tokens, shares_port)
        self._statuses = Health((classify.SERVICE, open_inference.SERVICE))
        _register(self._server, self._calls, inference, self._statuses)
        self.port = _listen(self._server, settings, certificates)

    @property
    def in_flight(self) -> int:
        """Number of calls accepted whose answers have not been sent yet."""
        return self._calls.in_flight

    @property
    def answered(self) -> int:
        """Number of calls answered with OK."""
        return self._calls.answered

    async def start(self) -> None:
        """Answers calls from now on."""
        await self._server.start()
        self._statuses.set_serving(True)

    async def drain(self, grace: float) -> int:
        """Refuses new calls and waits until the answers to accepted ones are sent, at most `grace` seconds.

        Returns:
            The number of calls that are still unanswered.
        """
        self._statuses.set_serving(False)
        return await self._calls.drain(grace)

    async def close(self, *, at_once: bool) -> None:
        """Closes all connections. Clients learn that theirs takes no more calls before their held calls are refused."""
        if not at_once:
            await self._calls.hold_new_calls()
        self._statuses.end_watches()
        closing = asyncio.create_task(self._server.stop(0 if at_once else _CLOSE_SECONDS))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        self._calls.refuse_held_calls()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(2 * _CLOSE_SECONDS):
                await closing


class _FaultsOfClients(logging.Filter):
    """Drops records that gRPC logs with a traceback for each client that vanishes or sends names that are no text."""

    _MESSAGES = ("ExecuteBatchError raised in core", "Invalid encoding on")

    def filter(self, record: logging.LogRecord) -> bool:
        """False for such a record."""
        return not str(record.msg).startswith(self._MESSAGES)


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
            # These limit what a stream may hold before its message is read; see service.receiving.
            ("grpc.http2.bdp_probe", 0),
            ("grpc.http2.lookahead_bytes", 32_768),
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
    protocol = OpenInference(inference, lambda: calls.draining, version)
    calls.register(
        server,
        open_inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server,
        protocol,
        counters=dict.fromkeys(("ModelInfer", "ModelStreamInfer"), open_inference.field_counter(max_images)),
        while_draining=open_inference.ANSWERED_WHILE_DRAINING,
        streams={
            "ModelStreamInfer": streams.request_stream(
                calls,
                open_inference.MODEL_STREAM_INFER,
                protocol.ModelStreamInfer,
                open_inference.stream_failure,
                ordered=True,
            )
        },
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


def _listen(server: grpc.aio.Server, settings: Settings, certificates: Certificates | None) -> int:
    where = ports.address(settings.host, settings.port)
    try:
        if certificates:
            return server.add_secure_port(where, credentials(certificates))
        return server.add_insecure_port(where)
    except RuntimeError as error:
        raise StartError(f"cannot listen on {where}: {error}") from error
