"""How a client reaches a server: TLS, token, time limits, and the options of the gRPC channel."""

from dataclasses import dataclass, field
from pathlib import Path

import grpc

from service.client.addresses import Addresses
from service.client.retrying import check_timeout

DEFAULT_TARGET = "127.0.0.1:50051"

_CHANNEL_OPTIONS: tuple[tuple[str, int | str], ...] = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2000),
    # The client repeats calls itself: it knows the deadline of the whole call and which errors are worth repeating.
    ("grpc.enable_retries", 0),
    # Calls go to all servers in turn, so that a repeated call reaches another server.
    ("grpc.service_config", '{"loadBalancingConfig": [{"round_robin": {}}]}'),
    # A name is looked up again when a connection ends, which happens at the server's --max-connection-age at the
    # latest. gRPC's default of 30 s between two look-ups would delay that.
    ("grpc.dns_min_time_between_resolutions_ms", 2_000),
    # A server that vanished without closing its connection is noticed after half a minute at most, well before the
    # deadline of a call, which is then repeated. The last limit is that of pings by which gRPC measures the bandwidth.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),
)


@dataclass(frozen=True)
class Options:
    """How to reach a server and how long to try.

    Attributes:
        tls: Use TLS. Without `ca`, the server's certificate is checked against the system's certificate authorities.
        ca: PEM file of the certificate authority that signed the server's certificate; turns TLS on.
        certificate: PEM file of the client's certificate, for mutual TLS; turns TLS on and needs `key`.
        key: PEM file of the private key of `certificate`.
        token: Bearer token that is sent with every call: printable ASCII characters.
        timeout: Seconds for a whole call, including all its requests and retries; None for no limit. More than a year
            means a year.
        attempts: Largest number of times that a request is sent.
        coalesce: Pack small calls that are made at the same time into shared requests.
        max_shared_requests: Largest number of shared requests in progress at once, for each address of the target.
            Calls wait, and gather, only while this many are in progress. gRPC does not say how many addresses a DNS
            name has: for dns:///NAME:PORT set twice the number of servers.
        server_name: Name of the servers in their certificates, if it is not the host of the target. TLS to several
            addresses needs it.
        allow_plaintext_token: Send the token without TLS to other machines too. Anybody on the network path can then
            read it.

    Raises:
        ValueError: The options contradict each other, or one of them has a value that cannot be used.
    """

    tls: bool = False
    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    token: str | None = field(default=None, repr=False)
    timeout: float | None = 60.0
    attempts: int = 10
    coalesce: bool = True
    max_shared_requests: int = 2
    allow_plaintext_token: bool = False
    server_name: str | None = None

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            given, missing = ("certificate", "key") if self.key is None else ("key", "certificate")
            raise ValueError(f"{given} is given without {missing}: mutual TLS needs both PEM files")
        for name in ("attempts", "max_shared_requests"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; it must be a whole number, at least 1")
        check_timeout(self.timeout)
        if self.token is not None and not isinstance(self.token, str):
            raise ValueError(f"the token is of type {type(self.token).__name__}; it must be a str")
        if self.token and not can_be_sent(self.token):
            raise ValueError(
                "the token holds a character that cannot be sent, but must consist of printable ASCII characters; look "
                "for line breaks, a byte order mark or accented letters where it is stored"
            )

    @property
    def encrypted(self) -> bool:
        """Whether the connection uses TLS."""
        return self.tls or self.ca is not None or self.certificate is not None

    def credentials(self) -> grpc.ChannelCredentials | None:
        """TLS as the options say; None for plaintext.

        Raises:
            OSError: A file cannot be read.
            ValueError: A file is not a PEM file.
        """
        if not self.encrypted:
            return None
        return grpc.ssl_channel_credentials(*(_read_pem(path) for path in (self.ca, self.key, self.certificate)))

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Metadata of every call."""
        return (("authorization", f"Bearer {self.token}"),) if self.token else ()

    def check_safe(self, addresses: Addresses) -> None:
        """Refuses to send a token that others can read on its way, and certificates that no name is compared with.

        Raises:
            ValueError: The token would be sent without TLS to another machine, or TLS to several addresses lacks the
                name of the servers.
        """
        if self.token and not (self.encrypted or self.allow_plaintext_token or addresses.all_loopback):
            raise ValueError(
                f"the token would be sent to {addresses.target} without encryption: use TLS (tls=True, or ca), "
                "or allow it with allow_plaintext_token=True"
            )
        if self.encrypted and len(addresses.hosts) > 1 and not self.server_name:
            raise ValueError(
                f"TLS to several addresses ({addresses.target}) needs the name in their certificates: "
                "set server_name (--server-name)"
            )


def channel_options(addresses: Addresses, server_name: str | None = None) -> tuple[tuple[str, int | str], ...]:
    """Options of a gRPC channel. A proxy named in the environment is not used for servers on this machine.

    Args:
        addresses: The servers.
        server_name: Name of the servers, if it is not the host of the target.
    """
    options = _CHANNEL_OPTIONS
    if addresses.all_loopback:
        options += (("grpc.enable_http_proxy", 0),)
    if authority := server_name or addresses.authority:
        options += (("grpc.default_authority", authority),)
    return options


def can_be_sent(token: str) -> bool:
    """Whether gRPC can send a token. It refuses others only in the call, with an error that quotes them."""
    return token.isascii() and token.isprintable()


def read_token(path: Path) -> str:
    """The first token of a file that holds one token a line. Empty lines and lines that begin with # are skipped.

    Raises:
        OSError: The file cannot be read.
        ValueError: It holds no token.
    """
    for line in path.read_text(encoding="utf-8").splitlines():
        if (token := line.strip()) and not token.startswith("#"):
            return token
    raise ValueError(f"{path} holds no token: write it on a line of its own")


def _read_pem(path: Path | None) -> bytes | None:
    if path is None:
        return None
    content = Path(path).read_bytes()
    if b"-----BEGIN " not in content:
        raise ValueError(f"{path} is not a PEM file: it holds no line '-----BEGIN …'")
    return content
