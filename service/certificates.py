"""TLS certificates of the server, read from files and reloaded when the files change. Knows no transport."""

import asyncio
import logging
import ssl
from dataclasses import dataclass
from pathlib import Path

from service.errors import StartError
from service.watch import NotReady, Watcher, read_watched

logger = logging.getLogger(__name__)

# OpenSSL's reasons if the key does not belong to the certificate: of the same type, and of another type.
_MISMATCHES = ("KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH", "NO_CERTIFICATE_ASSIGNED")


@dataclass(frozen=True, eq=False, repr=False)
class TlsFiles:
    """The contents of the files, and the same as a context of Python's ssl module.

    Attributes:
        certificate: PEM, the certificate chain of the server.
        key: PEM, its private key.
        client_ca: PEM, the authority that signs the certificates of clients; None if they need none.
        context: For the server's end of connections. Requires a client certificate if there is a `client_ca`.
    """

    certificate: bytes
    key: bytes
    client_ca: bytes | None
    context: ssl.SSLContext


class Certificates:
    """The certificate and key of the server, and the authority that signs the certificates of clients.

    Renewed files apply to connections made after the reload; files that cannot be used leave the old ones in use.

    Attributes:
        current: The files as they were last loaded.

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
        self.current = self._load()

    async def watch(self) -> None:
        """Reloads the files when they change, until cancelled."""
        await self._watcher.run()

    async def _reload(self) -> None:
        self.current = await asyncio.to_thread(self._load)
        logger.info("certificates were read again; new connections use them")

    def _keep_old(self, error: Exception) -> None:
        logger.error("the new certificates cannot be used, the old ones stay in use: %s", error)

    def _load(self) -> TlsFiles:
        content = self._read_all()
        context = self._open()
        # ssl reads the files itself. It has checked this content only if the files have not changed meanwhile.
        if self._read_all() != content:
            raise NotReady(f"{self._certificate} and {self._key} changed while they were read")
        return TlsFiles(*content, context)

    def _read_all(self) -> tuple[bytes, bytes, bytes | None]:
        certificate, key = _read_pem(self._certificate), _read_pem(self._key)
        return certificate, key, _read_pem(self._client_ca) if self._client_ca else None

    def _open(self) -> ssl.SSLContext:
        """Loads the files with OpenSSL. This also checks them: gRPC says of unusable files only that it cannot bind."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        # A session that is resumed would not present its certificate again.
        context.num_tickets = 0
        context.options |= ssl.OP_NO_TICKET
        encrypted = False

        def passphrase() -> str:  # without this function OpenSSL would ask on the terminal
            nonlocal encrypted
            encrypted = True
            return ""

        try:
            context.load_cert_chain(self._certificate, self._key, passphrase)
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
                context.load_verify_locations(self._client_ca)
            except OSError as error:
                raise NotReady(f"the client CA file {self._client_ca} cannot be used: {_reason(error)}") from error
            context.verify_mode = ssl.CERT_REQUIRED
        return context


def _reason(error: OSError) -> str:
    if isinstance(error, ssl.SSLError):
        return error.reason or "it is cut off, or not PEM"  # OpenSSL gives no reason for errors in PEM
    return error.strerror or str(error)


def _read_pem(path: Path) -> bytes:
    content = read_watched(path, "TLS file")
    if b"-----BEGIN " not in content:
        raise StartError(f"{path} is not a PEM file: it contains no '-----BEGIN'")
    return content
