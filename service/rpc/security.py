"""Who may send requests: TLS certificates and bearer tokens, read from files and reloaded when the files change.

No secret is logged, shown by repr, or part of an error message: only SHA-256 digests of tokens are kept.
"""

import asyncio
import contextlib
import hashlib
import hmac
import logging
import ssl
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import grpc

from service.errors import StartError
from service.rpc.receiving import Context
from service.watch import NotReady, Watcher

logger = logging.getLogger(__name__)

_UNAUTHENTICATED = "a valid token is needed: send the metadata 'authorization: Bearer TOKEN'"
_REVOKED = "the token of this call was revoked: call again with a valid one"
# A client that reads nothing cannot be sent a status. After this time its call is ended without one.
_STATUS_SECONDS = 1.0
# OpenSSL's reasons if the key does not belong to the certificate: of the same type, and of another type.
_MISMATCHES = ("KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH", "NO_CERTIFICATE_ASSIGNED")

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any] | None"
Continuation: TypeAlias = "Callable[[grpc.HandlerCallDetails], Awaitable[Handler]]"
Behaviour: TypeAlias = Callable[[Any, Any], Any]


def _read(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise NotReady(f"{what} {path} cannot be read: {error.strerror}") from error


class Certificates:
    """The certificate and key of the server, and the authority that signs the certificates of clients.

    Renewed files apply to connections made after the reload; files that cannot be used leave the old ones in use.

    Args:
        certificate: PEM file of the certificate chain of the server.
        key: PEM file of its private key, without a passphrase.
        client_ca: PEM file of the authority. If given, clients must present a certificate that it signed (mutual TLS).

    Raises:
        StartError: A file cannot be read or used, or certificate and key do not belong together.
    """

    def __init__(self, certificate: Path, key: Path, client_ca: Path | None) -> None:
        self._certificate, self._key, self._client_ca = certificate, key, client_ca
        paths = [certificate, key, *([client_ca] if client_ca else [])]
        self._watcher = Watcher(lambda: paths, self._reload, self._keep_old)
        self._first = self._load()
        self._renewed: grpc.ServerCertificateConfiguration | None = None

    def credentials(self) -> grpc.ServerCredentials:
        """Credentials for one port of the server, which follow the files from then on."""
        return grpc.dynamic_ssl_server_credentials(
            self._first, self._take_renewed, require_client_authentication=self._client_ca is not None
        )

    async def watch(self) -> None:
        """Reloads the files when they change, until cancelled."""
        await self._watcher.run()

    def _take_renewed(self) -> Any:  # noqa: ANN401 -- None means "no change", which the published type leaves out
        """The configuration that was loaded since the last call, if any. gRPC calls this at each handshake."""
        renewed, self._renewed = self._renewed, None
        return renewed

    async def _reload(self) -> None:
        self._renewed = await asyncio.to_thread(self._load)
        logger.info("certificates were read again; new connections use them")

    def _keep_old(self, error: Exception) -> None:
        logger.error("the new certificates cannot be used, the old ones stay in use: %s", error)

    def _load(self) -> grpc.ServerCertificateConfiguration:
        content = self._read_all()
        self._check()
        # ssl reads the files itself. It has checked this content only if the files have not changed meanwhile.
        if self._read_all() != content:
            raise NotReady(f"{self._certificate} and {self._key} changed while they were read")
        certificate, key, client_ca = content
        return grpc.ssl_server_certificate_configuration([(key, certificate)], root_certificates=client_ca)

    def _read_all(self) -> tuple[bytes, bytes, bytes | None]:
        certificate, key = _read_pem(self._certificate), _read_pem(self._key)
        return certificate, key, _read_pem(self._client_ca) if self._client_ca else None

    def _check(self) -> None:
        """Checks the files with OpenSSL, since gRPC reports unusable ones only as a port that it cannot bind."""
        encrypted = False

        def passphrase() -> str:  # without this function OpenSSL would ask on the terminal
            nonlocal encrypted
            encrypted = True
            return ""

        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self._certificate, self._key, passphrase)
        except OSError as error:  # ssl.SSLError is a subclass
            pair = f"the certificate {self._certificate} and the private key {self._key}"
            if encrypted:
                raise StartError(
                    f"the private key {self._key} is encrypted, and the server has no passphrase: "
                    f"decrypt it with: openssl pkey -in {self._key} -out NEW_FILE"
                ) from error
            if _reason(error) in _MISMATCHES:
                raise NotReady(f"{pair} do not belong together") from error
            raise NotReady(f"{pair} cannot be used: {_reason(error)}") from error
        if self._client_ca:
            try:
                ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(self._client_ca)
            except OSError as error:
                raise NotReady(f"the client CA file {self._client_ca} cannot be used: {_reason(error)}") from error


def _reason(error: OSError) -> str:
    if isinstance(error, ssl.SSLError):
        return error.reason or "it is cut off, or not PEM"  # OpenSSL gives no reason for errors in PEM
    return error.strerror or str(error)


def _read_pem(path: Path) -> bytes:
    content = _read(path, "TLS file")
    if b"-----BEGIN " not in content:
        raise StartError(f"{path} is not a PEM file: it contains no '-----BEGIN'")
    return content


class RunningCall:
    """A call that was admitted with a token; `revoke` ends it."""

    def __init__(self, task: "asyncio.Task[Any]") -> None:
        self._task = task
        self.revoked = False

    def revoke(self) -> None:
        """Cancels the task of the call."""
        self.revoked = True
        self._task.cancel()


class Tokens:
    """The tokens in a file, one per line; empty lines and lines that start with # are ignored.

    Raises:
        StartError: The file cannot be read or contains no token.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._watcher = Watcher(lambda: [path], self._reload, self._keep_old)
        self._digests = self._load()
        self._calls: defaultdict[bytes, set[RunningCall]] = defaultdict(set)

    def find(self, authorization: str | bytes | None) -> bytes | None:
        """The digest of the token in the metadata `authorization`, or None if it holds no valid token."""
        given = authorization.encode() if isinstance(authorization, str) else authorization or b""
        scheme, _, token = given.partition(b" ")
        digest = hashlib.sha256(token.strip()).digest()
        # Compares with every token, in constant time, so that response times reveal nothing about them.
        matches = [hmac.compare_digest(digest, valid) for valid in self._digests]
        return digest if scheme.lower() == b"bearer" and any(matches) else None

    @contextlib.contextmanager
    def running(self, digest: bytes) -> Iterator[RunningCall]:
        """Registers the current task as a call made with this token, so that revoking the token ends it."""
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a call runs in a task")
        call = RunningCall(task)
        self._calls[digest].add(call)
        if digest not in self._digests:  # revoked since `find`
            call.revoke()
        try:
            yield call
        finally:
            self._calls[digest].discard(call)
            if not self._calls[digest]:
                del self._calls[digest]

    async def watch(self) -> None:
        """Reloads the file when it changes, until cancelled."""
        await self._watcher.run()

    async def _reload(self) -> None:
        valid = await asyncio.to_thread(self._load)
        revoked = [call for digest, calls in self._calls.items() if digest not in valid for call in calls]
        self._digests = valid
        for call in revoked:
            call.revoke()
        logger.info("tokens were read again: %d are valid; running calls ended: %d", len(valid), len(revoked))

    def _keep_old(self, error: Exception) -> None:
        logger.error("the new tokens cannot be used, the old ones stay valid: %s", error)

    def _load(self) -> frozenset[bytes]:
        lines = [line.strip() for line in _read(self._path, "token file").splitlines()]
        digests = frozenset(hashlib.sha256(line).digest() for line in lines if line and not line.startswith(b"#"))
        if not digests:
            raise StartError(f"token file {self._path} contains no token: write one token per line")
        return digests


class TokenInterceptor(grpc.aio.ServerInterceptor):
    """Answers calls without a valid token with UNAUTHENTICATED, before their messages are read.

    Streams, health watches and reflection included, also end with UNAUTHENTICATED when their token is revoked.
    A unary call that was admitted is answered.

    Args:
        tokens: The valid tokens.
        health_without_token: Whether health checks need no token.
        on_refused: Called with the method of each refused call.
    """

    def __init__(self, tokens: Tokens, health_without_token: bool, on_refused: Callable[[str], None]) -> None:
        self._tokens, self._health, self._on_refused = tokens, health_without_token, on_refused

    async def intercept_service(self, continuation: Continuation, details: grpc.HandlerCallDetails) -> Handler:
        """Returns the handler of the method, or one that refuses the call."""
        if self._health and details.method.startswith("/grpc.health.v1.Health/"):
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
