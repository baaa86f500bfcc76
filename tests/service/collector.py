"""An OpenTelemetry collector for tests: it receives spans over OTLP, on the loopback interface, and keeps them."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.common.v1.common_pb2 import KeyValue


@dataclass(frozen=True)
class Span:
    """A span. Times are in nanoseconds since 1970, ids in hexadecimal; `kind` and `status` are numbers of OTLP."""

    name: str
    trace: str
    identity: str
    parent: str
    kind: int
    start: int
    end: int
    status: int
    attributes: dict[str, object]
    resource: dict[str, object]


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps the spans that it receives."""

    def __init__(self) -> None:
        self.target = ""
        self._spans: list[Span] = []
        self._lock = threading.Lock()

    def Export(self, request, context):  # noqa: N802 -- the protocol's name
        with self._lock:
            for part in request.resource_spans:
                resource = values(part.resource.attributes)
                for scope in part.scope_spans:
                    self._spans += [
                        Span(
                            each.name, each.trace_id.hex(), each.span_id.hex(), each.parent_span_id.hex(), each.kind,
                            each.start_time_unix_nano, each.end_time_unix_nano, each.status.code,
                            values(each.attributes), resource,
                        )
                        for each in scope.spans
                    ]  # fmt: skip
        return trace_service_pb2.ExportTraceServiceResponse()

    def spans(self, trace: str) -> list[Span]:
        """The spans of one trace, the earliest first."""
        with self._lock:
            return sorted((span for span in self._spans if span.trace == trace), key=lambda span: span.start)

    def __len__(self) -> int:
        with self._lock:
            return len(self._spans)


def values(attributes: list[KeyValue]) -> dict[str, object]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in attributes}


@contextmanager
def collect() -> Iterator[Collector]:
    """A collector that runs until the `with` block ends."""
    collector = Collector()
    server = grpc.server(ThreadPoolExecutor(4))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    collector.target = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield collector
    finally:
        server.stop(0).wait()
