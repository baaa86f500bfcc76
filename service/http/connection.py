"""One HTTP/1.1 connection: uvicorn's protocol, with the limits on time and memory that it does not have.

uvicorn bounds the size of headers and the time between two requests. It does not bound the time for headers, for
reading an answer, and for the rest of a body that was refused; nor how many chunks a body may be cut into. The server
asks each connection twice a second whether it is overdue (`overdue`), because timers for each request cost more.
"""

import asyncio
import contextlib
import fcntl
import re
import socket
import struct
import termios
import time
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, cast

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle
from uvicorn.server import ServerState

from service.http.answers import problem

# Time for the headers of a request to arrive, from the acceptance of the connection or the first byte of the request.
HEADERS_SECONDS = 10.0
# Largest size of the headers of a request.
MAX_HEADERS_BYTES = 16_384
# Largest number of headers of a request.
MAX_HEADERS = 128
# Time that a connection may be idle between two requests.
IDLE_SECONDS = 75
# Longest time without progress for a client that reads an answer: in general, and while many bytes wait.
MAX_UNREAD_SECONDS = 10.0
MAX_UNREAD_SECONDS_WHEN_FULL = 1.0
MAX_UNREAD_BYTES = 64 * 2**20
# Time in which the rest of a body is read and dropped after the request was refused. A connection that is closed while
# its client sends is reset, and the client would not see why.
DISCARD_SECONDS = 5.0
# Each chunk of a body costs about 10 µs, so a body of chunks of a byte would block the event loop for long.
_FREE_CHUNKS = 512
_MIN_CHUNK_BYTES = 256


class _Parser(h11.Connection):
    """h11's parser, with further limits.

    h11 limits the size only of headers that have not arrived as a whole. It accepts versions that do not exist, and a
    body with both of the headers that may say where it ends, which a proxy in front may understand in another way.
    """

    def __init__(self) -> None:
        super().__init__(h11.SERVER, MAX_HEADERS_BYTES)
        # About the last error, for the answer.
        self.status = HTTPStatus.BAD_REQUEST
        self.problem = ""
        self._chunks = self._bytes = 0

    def next_event(self) -> Any:  # noqa: ANN401 -- h11's events have no common base that it publishes
        """See h11.Connection.next_event."""
        try:
            event = super().next_event()
            self._check(event)
            if isinstance(event, h11.Request) and not event.target.startswith(b"/"):
                event = _with_path(event)
        except h11.RemoteProtocolError as error:
            self.status = HTTPStatus(error.error_status_hint)
            self.problem = str(error)
            raise
        return event

    def _check(self, event: object) -> None:
        if isinstance(event, h11.Data):
            self._chunks += 1
            self._bytes += len(event.data)
            if self._chunks > _FREE_CHUNKS + self._bytes / _MIN_CHUNK_BYTES:
                raise h11.RemoteProtocolError(
                    f"the body has {self._chunks} chunks for {self._bytes} bytes: send larger chunks, or Content-Length"
                )
        elif isinstance(event, h11.Request):
            self._chunks = self._bytes = 0
            _check_head(event)


def _check_head(request: h11.Request) -> None:
    """Accepts the line and the headers of a request.

    Raises:
        h11.RemoteProtocolError: They break a rule or a limit.
    """
    if request.http_version not in (b"1.0", b"1.1"):
        raise h11.RemoteProtocolError(
            f"its version is HTTP/{request.http_version.decode()}; it must be 1.0 or 1.1",
            error_status_hint=HTTPStatus.HTTP_VERSION_NOT_SUPPORTED,
        )
    size = len(request.target) + sum(len(name) + len(value) + 4 for name, value in request.headers)
    if len(request.headers) > MAX_HEADERS or size > MAX_HEADERS_BYTES:
        raise h11.RemoteProtocolError(
            f"it has {len(request.headers)} headers of {size} bytes; at most {MAX_HEADERS} headers and "
            f"{MAX_HEADERS_BYTES} bytes are allowed",
            error_status_hint=HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
        )
    if {b"content-length", b"transfer-encoding"} <= {name for name, _ in request.headers}:
        raise h11.RemoteProtocolError("it has both Content-Length and Transfer-Encoding: send one of them")


def _with_path(request: h11.Request) -> h11.Request:
    """The request with the path of its target, if that is a whole URL as proxies receive it (RFC 9112, 3.2.2)."""
    scheme, separator, rest = request.target.partition(b"://")
    if not separator or scheme.lower() not in (b"http", b"https"):
        return request
    authority = re.split(rb"[/?]", rest, maxsplit=1)[0]
    path = rest[len(authority) :]
    return h11.Request(
        method=request.method,
        headers=request.headers,
        target=path if path.startswith(b"/") else b"/" + path,
        http_version=request.http_version,
    )


class _Transport:
    """A transport that is closed once, however often `close` is called.

    asyncio's transport for TLS forgets its connection when it is closed a second time, which uvicorn and the server may
    do while the client has not confirmed the first. Every call after that would fail.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport

    def close(self) -> None:
        """See asyncio.Transport."""
        if not self._transport.is_closing():
            self._transport.close()

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 -- whatever the transport has
        return getattr(self._transport, name)


class Connection(H11Protocol):
    """A connection of one client.

    Args:
        config: uvicorn's configuration; holds the application.
        state: What all connections of the server share.
        on_open: Called once this is one of the connections in `state`: with TLS, after the handshake.

    Attributes:
        peer: Address of the client's end.
        task: The task that answers the current request; it is cancelled if the client disconnects.
        last_request: When its last request arrived, on time.monotonic(); 0.0 before the first.
        is_malformed: Whether what it sent was refused because it is not HTTP. Nothing follows on the connection.
    """

    def __init__(self, config: Config, state: ServerState, on_open: Callable[[], None] = lambda: None) -> None:
        super().__init__(config, state, {"connection": self})
        self._on_open = on_open
        self.conn = _Parser()
        self.peer = ""
        self.task: asyncio.Task[Any] | None = None
        self._opened = self._head_since = self._answered = time.monotonic()
        self._waits_for_head = True
        self._unread, self._unread_since = 0, 0.0
        self._socket: socket.socket | None = None
        self.last_request = 0.0
        self.is_malformed = False

    # Called by the transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.Protocol."""
        super().connection_made(cast(asyncio.Transport, _Transport(cast(asyncio.Transport, transport))))
        self.peer = "http:" + ":".join(map(str, (transport.get_extra_info("peername") or ("unknown",))[:2]))
        self._socket = transport.get_extra_info("socket")
        self._on_open()

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol. Nobody waits for the answer any more, so its task is cancelled."""
        super().connection_lost(exc)
        self._unset_keepalive_if_required()
        if self.task is not None:
            self.task.cancel()

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        discarded = self._discards
        try:
            super().data_received(data)
        except h11.LocalProtocolError:  # the client broke the protocol after its answer had begun
            self.transport.abort()
        if not self.is_idle:
            self._waits_for_head = False
        elif not discarded or self._has_part_of_head:
            self._wait_for_head()

    def _wait_for_head(self) -> None:
        """The time for the headers of the next request begins, unless it has begun already."""
        if not self._waits_for_head:
            self._waits_for_head, self._head_since = True, time.monotonic()

    @property
    def _discards(self) -> bool:
        """Whether the rest of a body is dropped, after the answer to its request."""
        return self.is_idle and self.conn.their_state is h11.SEND_BODY

    @property
    def _has_part_of_head(self) -> bool:
        """Whether a part of the headers of the next request has arrived."""
        return not self._discards and bool(self.conn.trailing_data[0])

    # Called by uvicorn

    def on_response_complete(self) -> None:
        """Begins the next request, if it has arrived. If only a part of its headers has, their time begins now."""
        self._answered = time.monotonic()
        super().on_response_complete()
        if self.is_idle and self._has_part_of_head:
            self._wait_for_head()

    def send_400_response(self, msg: str) -> None:
        """Answers a request that is not HTTP, and closes the connection."""
        self.is_malformed = True
        parser = cast(_Parser, self.conn)
        status, detail = parser.status, parser.problem or msg
        answer = problem(status, f"the request cannot be read: {detail}")
        headers = [*answer.all_headers(), (b"connection", b"close")]
        with contextlib.suppress(h11.LocalProtocolError):  # an answer has begun already
            for event in (
                h11.Response(status_code=status.value, headers=headers, reason=status.phrase.encode()),
                h11.Data(data=answer.body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    # Called by the server

    @property
    def is_idle(self) -> bool:
        """Whether no request is being answered."""
        cycle = cast(RequestResponseCycle | None, self.cycle)
        return cycle is None or cycle.response_complete

    @property
    def body_is_complete(self) -> bool:
        """Whether the body of the current request has arrived as a whole."""
        return not self.cycle.more_body

    @property
    def must_close(self) -> bool:
        """Whether nothing can follow the current request on this connection.

        That is the case if its body was not wanted by the server and not sent by the client ("Expect: 100-continue").
        """
        return bool(self.cycle.waiting_for_100_continue)

    @property
    def unread(self) -> int:
        """Bytes of answers that the client has not read, here and in the kernel.

        TLS hides what waits between the two. As long as it waits, the kernel's part is not empty.
        """
        waiting = self.transport.get_write_buffer_size()
        # With TLS the transport forgets the socket some time before `connection_lost` is called.
        descriptor = self._socket.fileno() if self._socket else -1
        if descriptor >= 0:
            (in_kernel,) = struct.unpack("i", fcntl.ioctl(descriptor, termios.TIOCOUTQ, bytes(4)))
            waiting += in_kernel
        return waiting

    @property
    def idle_since(self) -> float:
        """When its last request arrived, or it was opened, on time.monotonic()."""
        return max(self._opened, self.last_request)

    def age(self, now: float) -> float:
        """Seconds since it was opened."""
        return now - self._opened

    def overdue(self, now: float, *, full: bool) -> bool:
        """Whether the client took too long. Call it regularly.

        Args:
            now: time.monotonic().
            full: Whether the unread answers of all connections exceed their limit.
        """
        unread = self.unread
        if not unread or unread < self._unread or not self._unread:
            self._unread_since = now
        self._unread = unread
        if unread and now - self._unread_since > (MAX_UNREAD_SECONDS_WHEN_FULL if full else MAX_UNREAD_SECONDS):
            return True
        if not self.is_idle:
            return False
        if self._discards:
            return now - self._answered > DISCARD_SECONDS
        if self._waits_for_head:
            return now - self._head_since > HEADERS_SECONDS
        return now - self._answered > IDLE_SECONDS

    def abort(self) -> None:
        """Closes it at once. What was not sent is dropped."""
        self.transport.abort()

    def close(self) -> None:
        """Closes it once everything is sent. Call it while it is idle."""
        self.transport.close()
