"""Who may ask: TLS from files, bearer tokens from a file. Both are read again when they change.

No secret is ever logged, nor part of an error.
"""

import asyncio
import hashlib
import hmac
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeAlias

import grpc

from service.errors import StartError

logger = logging.getLogger(__name__)

POLL_SECONDS = 1.0
_UNAUTHENTICATED = "a valid token is needed: send the metadata 'authorization: Bearer TOKEN'"

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any] | None"
Continuation: TypeAlias = "Callable[[grpc.HandlerCallDetails], Awaitable[Handler]]"


def server_credentials(certificate: Path, key: Path, client_ca: Path | None) -> grpc.ServerCredentials:
    """TLS with these PEM files; with `client_ca`, clients must show a certificate that it signed.

    A file that changed is taken for the connections that come after; one that cannot be read then leaves what was.

    Raises:
        StartError: A file cannot be read, or gRPC cannot use it.
    """
    read = [_read(path, "TLS file") for path in (certificate, key, *([client_ca] if client_ca else []))]
    for content, path in zip(read, (certificate, key, client_ca), strict=False):
        if b"-----BEGIN " not in content:
            raise StartError(f"{path} is not a PEM file: it holds no '-----BEGIN'")
    last = read

    # gRPC asks at every handshake; None means no change, which its types do not know.
    def changed() -> Any:  # noqa: ANN401
        nonlocal last
        try:
            now = [_read(path, "TLS file") for path in (certificate, key, *([client_ca] if client_ca else []))]
        except StartError as error:
            logger.error("the certificates are kept: %s", error)  # noqa: TRY400
            return None
        if now == last:
            return None
        last = now
        logger.info("certificates were read again")
        return _configuration(now)

    return grpc.dynamic_ssl_server_credentials(
        _configuration(read), changed, require_client_authentication=client_ca is not None
    )


def _configuration(files: list[bytes]) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration(
        [(files[1], files[0])], root_certificates=files[2] if len(files) > 2 else None
    )


def _read(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise StartError(f"{what} {path} cannot be read: {error.strerror}") from error


class Tokens:
    """The tokens of a file, one a line; empty lines and lines that begin with # do not count.

    Raises:
        StartError: The file cannot be read or holds no token.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen = self._signature()
        self._digests = self._load()

    def allow(self, authorization: str | bytes | None) -> bool:
        """Whether the metadata `authorization` holds one of them. Takes the same time for every wrong token."""
        given = authorization.encode() if isinstance(authorization, str) else authorization or b""
        scheme, _, token = given.partition(b" ")
        digest = hashlib.sha256(token.strip()).digest()
        # Every one is compared, in constant time, so that the answer's delay tells nothing about them.
        matches = [hmac.compare_digest(digest, valid) for valid in self._digests]
        return scheme.lower() == b"bearer" and any(matches)

    async def watch(self) -> None:
        """Reads the file again whenever it changes, until cancelled; one that cannot be read leaves what was."""
        while True:
            await asyncio.sleep(POLL_SECONDS)
            signature = self._signature()
            if signature != self._seen:
                self._seen = signature
                try:
                    self._digests = self._load()
                except StartError as error:
                    logger.error("the tokens are kept: %s", error)  # noqa: TRY400
                else:
                    logger.info("tokens were read again: %d are valid", len(self._digests))

    def _load(self) -> list[bytes]:
        lines = [line.strip() for line in _read(self._path, "token file").splitlines()]
        digests = [hashlib.sha256(line).digest() for line in lines if line and not line.startswith(b"#")]
        if not digests:
            raise StartError(f"token file {self._path} holds no token: write one on a line of its own")
        return digests

    def _signature(self) -> tuple[int, int, int] | None:
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_ino, status.st_size, status.st_mtime_ns


class TokenInterceptor(grpc.aio.ServerInterceptor):
    """Answers UNAUTHENTICATED to calls without a valid token, before their messages are read.

    Args:
        tokens: Those that are valid.
        health_without_token: Lets health checks pass.
        on_refused: Told the method of each call refused.
    """

    def __init__(self, tokens: Tokens, health_without_token: bool, on_refused: Callable[[str], None]) -> None:
        self._tokens, self._health, self._on_refused = tokens, health_without_token, on_refused

    async def intercept_service(self, continuation: Continuation, details: grpc.HandlerCallDetails) -> Handler:
        """Lets the call pass, or gives it a handler that refuses."""
        if self._health and details.method.startswith("/grpc.health.v1.Health/"):
            return await continuation(details)
        metadata = dict(details.invocation_metadata or ())
        if self._tokens.allow(metadata.get("authorization")):
            return await continuation(details)
        self._on_refused(details.method)
        # As a stream in both directions it fits every method, and no message is read before the answer.
        return grpc.stream_stream_rpc_method_handler(_refuse)


async def _refuse(_requests: object, context: "grpc.aio.ServicerContext[Any, Any]") -> None:
    await context.abort(grpc.StatusCode.UNAUTHENTICATED, _UNAUTHENTICATED)
