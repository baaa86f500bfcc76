"""Turns errors into gRPC statuses."""

from typing import Any, NoReturn, Self, TypeAlias

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

    def without_history(self) -> Self:
        """This failure without the traceback and the errors that led to it, which hold the request in memory."""
        self.__traceback__ = self.__cause__ = self.__context__ = None
        return self


def trailing_metadata(failure: Failure) -> tuple[tuple[str, str | bytes], ...]:
    """Metadata that says when to retry, in both forms that clients know; empty if the failure has no such hint."""
    if failure.retry_after is None:
        return ()
    retry = RetryInfo(retry_delay=Duration(nanos=0))
    retry.retry_delay.FromNanoseconds(int(failure.retry_after * 1e9))
    detail = AnyMessage()
    detail.Pack(retry)
    status = Status(code=failure.code.value[0], message=failure.message, details=[detail])
    return (
        ("grpc-retry-pushback-ms", str(int(failure.retry_after * 1000))),
        ("grpc-status-details-bin", status.SerializeToString()),
    )


async def abort(context: Context, failure: Failure) -> NoReturn:
    """Ends a call with a status and the hint when to retry."""
    await context.abort(failure.code, failure.message, trailing_metadata=trailing_metadata(failure))
    raise AssertionError("abort returned")
