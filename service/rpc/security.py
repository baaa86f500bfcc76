"""Who may send requests over gRPC: credentials of the port, and an interceptor that checks the token of each call."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import grpc

from service.certificates import Certificates
from service.rpc import health, open_inference
from service.rpc.statuses import Context
from service.tokens import Tokens

_UNAUTHENTICATED = "a valid token is needed: send the metadata 'authorization: Bearer TOKEN'"
_REVOKED = "the token of this call was revoked: call again with a valid one"
_HEALTH = f"/{health.SERVICE}/"
_OPEN_INFERENCE_HEALTH = {f"/{open_inference.SERVICE}/{name}" for name in ("ServerLive", "ServerReady", "ModelReady")}
# A client that reads nothing cannot be sent a status. After this time its call is ended without one.
_STATUS_SECONDS = 1.0

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any] | None"
Continuation: TypeAlias = "Callable[[grpc.HandlerCallDetails], Awaitable[Handler]]"
Behaviour: TypeAlias = Callable[[Any, Any], Any]


def credentials(certificates: Certificates) -> grpc.ServerCredentials:
    """Credentials for one port of the server, which follow the files from then on."""
    used = certificates.current

    def configuration() -> grpc.ServerCertificateConfiguration:
        files = certificates.current
        return grpc.ssl_server_certificate_configuration(
            [(files.key, files.certificate)], root_certificates=files.client_ca
        )

    def renewed() -> Any:  # noqa: ANN401 -- None means "no change", which the published type leaves out
        """The configuration if it has changed since the last call. gRPC calls this at each handshake."""
        nonlocal used
        if certificates.current is used:
            return None
        used = certificates.current
        return configuration()

    return grpc.dynamic_ssl_server_credentials(
        configuration(), renewed, require_client_authentication=used.client_ca is not None
    )


class TokenInterceptor(grpc.aio.ServerInterceptor):
    """Answers calls without a valid token with UNAUTHENTICATED, before their messages are read.

    Streams, health watches and reflection included, also end with UNAUTHENTICATED when their token is revoked.
    A unary call that was admitted is answered.

    Args:
        tokens: The valid tokens.
        health_without_token: Whether health checks need no token, those of the Open Inference Protocol included.
        on_refused: Called with the method of each refused call.
    """

    def __init__(self, tokens: Tokens, health_without_token: bool, on_refused: Callable[[str], None]) -> None:
        self._tokens, self._health, self._on_refused = tokens, health_without_token, on_refused

    async def intercept_service(self, continuation: Continuation, details: grpc.HandlerCallDetails) -> Handler:
        """Returns the handler of the method, or one that refuses the call."""
        if self._health and (details.method.startswith(_HEALTH) or details.method in _OPEN_INFERENCE_HEALTH):
            return await continuation(details)
        metadata = dict(details.invocation_metadata or ())
        digest = self._tokens.find(metadata.get("authorization"))
        if digest is None:
            self._on_refused(details.method)
            # A stream in both directions fits every method, and reads no message before it answers.
            return grpc.stream_stream_rpc_method_handler(_refuse)
        return self._ended_on_revocation(await continuation(details), digest)

    def _ended_on_revocation(self, handler: Handler, digest: bytes) -> Handler:
        # A unary call that was admitted is answered; service.rpc.calls registers it as one with a stream of requests.
        if handler is None or not handler.response_streaming or handler.stream_stream is None:
            return handler
        behaviour: Behaviour = handler.stream_stream

        async def guarded(requests: object, context: Context) -> None:
            with self._tokens.running(digest) as call:
                try:
                    await behaviour(requests, context)
                except asyncio.CancelledError:
                    if not call.revoked:
                        raise
                else:
                    return
            await _end_revoked(context)

        return grpc.stream_stream_rpc_method_handler(
            guarded,
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )


async def _refuse(_requests: object, context: Context) -> None:
    await context.abort(grpc.StatusCode.UNAUTHENTICATED, _UNAUTHENTICATED)


async def _end_revoked(context: Context) -> None:
    try:
        async with asyncio.timeout(_STATUS_SECONDS):
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, _REVOKED)
    except TimeoutError:
        # The client reads nothing. gRPC ends a cancelled call without sending a status.
        raise asyncio.CancelledError from None
