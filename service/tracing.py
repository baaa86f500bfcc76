"""OpenTelemetry spans of requests, for any transport. Off unless the environment names an exporter.

A transport opens a span for a request with `Tracing.request`. The parts of the server that the request passes then add
the spans of their phases to `current()`: receive, decode, queue, engine, answer. While tracing is off, `current()` is
always None, and no module of OpenTelemetry is imported.

Configured by the variables of OpenTelemetry (https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/).
"""

import contextlib
import importlib.metadata
import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

from service.errors import StartError

logger = logging.getLogger(__name__)

EXTRA = "tracing"
EXPORTER, DISABLED = "OTEL_TRACES_EXPORTER", "OTEL_SDK_DISABLED"
ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
# Entry points of OpenTelemetry's exporters, by protocol.
_OTLP = {"grpc": "otlp_proto_grpc", "http/protobuf": "otlp_proto_http"}
_ENTRY_POINTS = "opentelemetry_traces_exporter"
# A header that nobody here uses. OpenTelemetry would log a warning for each of its parts that is malformed.
_BAGGAGE = "baggage"
# Warns of malformed headers `traceparent` and `tracestate`, with text of the client, before its token is checked.
_HEADERS_LOGGER = "opentelemetry.trace"
SERVICE_NAME = "cifar-classifier"

Attributes = Mapping[str, str | int | float | bool]


class Trace:
    """A request whose spans are recorded. All times are seconds on time.monotonic().

    Attributes:
        arrived: When the request arrived.
    """

    __slots__ = ("_context", "_last", "_offset", "_span", "_tracer", "arrived")

    def __init__(self, tracer: Any, span: Any, context: Any, arrived: float, offset: int) -> None:  # noqa: ANN401
        self.arrived = arrived
        self._tracer, self._span, self._context, self._offset = tracer, span, context, offset
        self._last: float | None = None

    def phase(self, name: str, started: float, ended: float, attributes: Attributes | None = None) -> None:
        """Adds the span of a phase that is over."""
        child = self._tracer.start_span(
            name, context=self._context, start_time=self._nanoseconds(started), attributes=attributes
        )
        child.end(end_time=self._nanoseconds(ended))
        self._last = ended

    def finish(self, attributes: Attributes, error: str | None = None, *, answered: bool = True) -> None:
        """Says how the request ended. Call it when the answer is about to be sent.

        Args:
            attributes: Attributes of the span of the request, such as its status code.
            error: Why the server failed on the request; None if it did not. A request that breaks a rule is no failure
                of the server.
            answered: Whether there is an answer, whose span begins at the end of the last phase.
        """
        from opentelemetry.trace import StatusCode

        if answered and error is None and self._last is not None:
            self.phase("answer", self._last, time.monotonic())
        self._span.set_attributes(attributes)
        if error is not None:
            self._span.set_status(StatusCode.ERROR, error)

    def _nanoseconds(self, monotonic: float) -> int:
        """Nanoseconds since 1970."""
        return int(monotonic * 1e9) + self._offset


_current: ContextVar[Trace | None] = ContextVar("trace", default=None)
current = _current.get
"""The trace of the request that the current task answers; None if it is not traced."""


def add_phase(name: str, started: float) -> None:
    """Adds the span of a phase that ends now to the current trace, if there is one. `started`: time.monotonic()."""
    trace = current()
    if trace is not None:
        trace.phase(name, started, time.monotonic())


class Tracing:
    """Makes the spans of one server process; see `start`."""

    def __init__(self, provider: Any) -> None:  # noqa: ANN401 -- OpenTelemetry is not imported here
        from opentelemetry import propagate, trace

        logging.getLogger(_HEADERS_LOGGER).setLevel(logging.ERROR)
        self._provider = provider
        self._tracer = provider.get_tracer("service", importlib.metadata.version("cifar-classifier"))
        self._extract, self._in_context = propagate.extract, trace.set_span_in_context
        self._kind = trace.SpanKind.SERVER

    @contextlib.contextmanager
    def request(
        self, name: str, headers: Iterable[tuple[str, str | bytes]], attributes: Attributes, arrived: float
    ) -> Iterator[Trace | None]:
        """The span of a request, for the length of a `with` block. It is a child of the caller's span.

        Args:
            name: Name of the span, such as the name of a gRPC method or an HTTP method and route.
            headers: gRPC metadata or HTTP headers, with names in lower case; `traceparent` names the caller's span.
            attributes: Attributes of the span.
            arrived: When the request arrived, on time.monotonic().

        Yields:
            The trace; None if the caller or OTEL_TRACES_SAMPLER decided that this request is not recorded.
        """
        offset = time.time_ns() - time.monotonic_ns()
        caller = self._extract({key: value for key, value in headers if isinstance(value, str) and key != _BAGGAGE})
        span = self._tracer.start_span(
            name, context=caller, kind=self._kind, attributes=attributes, start_time=int(arrived * 1e9) + offset
        )
        if not span.is_recording():
            yield None
            return
        token = _current.set(trace := Trace(self._tracer, span, self._in_context(span, caller), arrived, offset))
        try:
            yield trace
        finally:
            _current.reset(token)
            span.end()

    def close(self) -> None:
        """Sends the spans that are not sent yet. Blocks until they are sent or the exporter gives up."""
        self._provider.shutdown()


def start(environment: Mapping[str, str], version: str) -> Tracing | None:
    """Turns on tracing if the environment asks for it; otherwise returns None.

    Args:
        environment: The environment variables.
        version: Version of the server.

    Raises:
        StartError: The environment asks for tracing, and the packages for it are not installed, or a variable has a
            value that they refuse.
    """
    asking = next((name for name in (EXPORTER, *ENDPOINTS) if environment.get(name)), None)
    exporters = [each.strip() for each in environment.get(EXPORTER, "").split(",") if each.strip()] or ["otlp"]
    if asking is None or exporters == ["none"] or environment.get(DISABLED, "").strip().lower() == "true":
        return None
    try:
        tracing = _start(exporters, environment, version)
    except StartError:
        raise
    except ImportError as error:
        raise StartError(
            f"{asking} asks for tracing, which needs the extra '{EXTRA}': pip install 'cifar-classifier[{EXTRA}]', "
            f"or set {DISABLED}=true"
        ) from error
    except Exception as error:  # of whatever kind the packages raise for a variable that they cannot use
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise StartError(
            f"tracing, which {asking} asks for, cannot be started: {reason}; check the variables that begin with "
            f"OTEL_, or set {DISABLED}=true"
        ) from error
    logger.info("tracing is on: spans go to %s", ", ".join(exporters))
    return tracing


def _start(exporters: Iterable[str], environment: Mapping[str, str], version: str) -> Tracing:
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    resource = Resource.create({"service.version": version})
    if str(resource.attributes["service.name"]).startswith("unknown_service"):  # the environment names no service
        resource = resource.merge(Resource({"service.name": SERVICE_NAME}))
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    for name in exporters:
        provider.add_span_processor(BatchSpanProcessor(_exporter(name, environment)))
    return Tracing(provider)


def _exporter(name: str, environment: Mapping[str, str]) -> Any:  # noqa: ANN401
    if name == "otlp":
        protocol = next((environment[each] for each in _PROTOCOLS if environment.get(each)), "grpc")
        if protocol not in _OTLP:
            raise StartError(f"{_PROTOCOLS[1]} is '{protocol}'; it must be one of: {', '.join(_OTLP)}")
        name = _OTLP[protocol]
    found = list(importlib.metadata.entry_points(group=_ENTRY_POINTS, name=name))
    if not found:
        raise StartError(
            f"{EXPORTER}: the exporter '{name}' is not installed: install its package, or for OTLP the extra '{EXTRA}'"
        )
    return found[0].load()()
