"""Turns errors into gRPC statuses."""

from typing import Any, NoReturn, TypeAlias

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status

from service.errors import (
    DeadlineExpired,
    EngineFailed,
    InvalidRequest,
    NotFound,
    Overloaded,
    RequestError,
    ShuttingDown,
    Unsupported,
)

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

CODES: dict[type[RequestError], grpc.StatusCode] = {
    InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    NotFound: grpc.StatusCode.NOT_FOUND,
    Unsupported: grpc.StatusCode.UNIMPLEMENTED,
    Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    DeadlineExpired: grpc.StatusCode.DEADLINE_EXCEEDED,
    ShuttingDown: grpc.StatusCode.UNAVAILABLE,
    EngineFailed: grpc.StatusCode.INTERNAL,
}


class Failure(Exception):
    """A gRPC status that ends a call, or one request of a stream."""

    def __init__(self, code: grpc.StatusCode, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.code, self.message, self.retry_after = code, message, retry_after


async def abort(context: Context, failure: Failure) -> NoReturn:
    """Ends a call with a status. Trailing metadata says when to retry, in both forms that clients know."""
    metadata: tuple[tuple[str, str | bytes], ...] = ()
    if failure.retry_after is not None:
        retry = RetryInfo(retry_delay=Duration(nanos=0))
        retry.retry_delay.FromNanoseconds(int(failure.retry_after * 1e9))
        detail = AnyMessage()
        detail.Pack(retry)
        status = Status(code=failure.code.value[0], message=failure.message, details=[detail])
        metadata = (
            ("grpc-retry-pushback-ms", str(int(failure.retry_after * 1000))),
            ("grpc-status-details-bin", status.SerializeToString()),
        )
    await context.abort(failure.code, failure.message, trailing_metadata=metadata)
    raise AssertionError("abort returned")
