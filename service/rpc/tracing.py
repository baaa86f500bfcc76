"""The spans of gRPC calls; see service.tracing."""

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import grpc

from service import tracing
from service.rpc.statuses import Context, Failure
from service.tracing import Tracing

# Statuses for which OpenTelemetry calls the server's span failed. The others are mistakes of the client, or intended.
_SERVER_ERRORS = frozenset(
    code.value[0]
    for code in (
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DATA_LOSS,
    )
)
_NAMES = {code.value[0]: code.name for code in grpc.StatusCode}
_OK: int = grpc.StatusCode.OK.value[0]
_CANCELLED: int = grpc.StatusCode.CANCELLED.value[0]
_UNKNOWN: int = grpc.StatusCode.UNKNOWN.value[0]

Handle = Callable[[object, Context], Coroutine[Any, Any, bytes]]


@contextlib.contextmanager
def request_span(maker: Tracing, method: str, context: Context) -> Iterator[None]:
    """The span of a call, or of one request of a stream, for the length of a `with` block.

    Args:
        maker: Makes the span.
        method: Full name of the method, SERVICE/METHOD.
        context: gRPC's context of the call.
    """
    service, _, name = method.partition("/")
    attributes = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": name}
    metadata: Any = context.invocation_metadata() or ()
    code = _OK
    with maker.request(method, metadata, attributes, time.monotonic()) as trace:
        try:
            yield
        except Failure as failure:
            code = failure.code.value[0]
            raise
        except asyncio.CancelledError:
            code = _CANCELLED
            raise
        except BaseException:
            code = _number(context)
            raise
        finally:
            if trace is not None:
                error = _NAMES.get(code, str(code)) if code in _SERVER_ERRORS else None
                trace.finish({"rpc.grpc.status_code": code}, error, answered=code == _OK)


def _number(context: Context) -> int:
    """The status with which a call was aborted."""
    code: Any = context.code()  # its type stub does not say that it can be None
    return _UNKNOWN if code is None else int(code.value[0])


def traced(maker: Tracing, method: str, handle: Handle) -> Handle:
    """The handler of a call, with spans."""

    async def handle_traced(requests: object, context: Context) -> bytes:
        with request_span(maker, method, context):
            return await handle(requests, context)

    return handle_traced


def on_received() -> None:
    """Adds the span of receiving the request of the current task, which has just been received and parsed."""
    trace = tracing.current()
    if trace is not None:
        trace.phase("receive", trace.arrived, time.monotonic())
