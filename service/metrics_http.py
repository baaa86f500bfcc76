"""Shows metrics over HTTP, for the single server process and for the supervisor of several.

Runs in the event loop of the process, without threads, because some of its clients may be hostile or broken: each
connection has a time limit, the number of connections is limited, and computing the metrics uses only a small share of
CPU time, however many scrapes arrive.
"""

import asyncio
import contextlib
import http.client
import io
import logging
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

from prometheus_client import CollectorRegistry, make_wsgi_app

from service import ports
from service.errors import StartError

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 64
# From the acceptance of a connection to the end of its answer; Prometheus itself waits 10 seconds.
CONNECTION_SECONDS = 10.0
_MAX_REQUEST_BYTES = 8192
# Computing the metrics occupies the event loop for a few milliseconds. The pause after it is this many times as long.
_PAUSE_FACTOR = 4


@contextlib.asynccontextmanager
async def show(registry: CollectorRegistry, host: str, port: int | None) -> AsyncIterator[int | None]:
    """Serves the metrics of `registry` at http://HOST:PORT/metrics until the `async with` block ends.

    Args:
        registry: The metrics to show.
        host: Name or address to listen on.
        port: Port to listen on; 0 selects a free port; None turns the page off.

    Yields:
        The port, or None.

    Raises:
        StartError: The address is not one of this machine, or the port is taken.
    """
    if port is None:
        yield None
        return
    listener = _listen(host, port)
    page = _MetricsPage(registry)
    server = await asyncio.start_server(page.accept, sock=listener, limit=_MAX_REQUEST_BYTES)
    try:
        port = listener.getsockname()[1]
        logger.info("metrics at http://%s/metrics", ports.address(host, port))
        yield port
    finally:
        server.close()
        page.close()


def _listen(host: str, port: int) -> socket.socket:
    name = host.strip("[]")
    try:
        family, _, _, _, where = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(where, family=family, backlog=MAX_CONNECTIONS)
    except OSError as error:
        # socket.create_server appends the address to the text of the error.
        reason = str(error.strerror).partition(" (while")[0]
        raise StartError(f"--metrics-port {port} of {host}: {reason}") from error


class _MetricsPage:
    """Answers requests for the metrics, one per connection.

    If the largest number of connections is open, a new connection replaces the one that has waited longest for its
    client to send or to read, so that silent clients cannot lock others out.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._application: Callable[..., Iterable[bytes]] = make_wsgi_app(registry)
        self._turn = asyncio.Lock()
        self._earliest = 0.0  # time of the next scrape
        self._connections: set[asyncio.Task[None]] = set()
        # Connections that wait for their client, the longest wait first.
        self._idle: dict[asyncio.Task[None], None] = {}

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serves one connection from its start to its end."""
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 -- for the type checker: a coroutine always runs in a task here
        if len(self._connections) >= MAX_CONNECTIONS and not self._end_longest_idle():
            writer.transport.abort()
            return
        self._connections.add(task)
        self._idle[task] = None
        try:
            async with asyncio.timeout(CONNECTION_SECONDS):
                head = await reader.readuntil(b"\r\n\r\n")
                self._idle.pop(task, None)
                writer.write(await self._answer(head))
                self._idle[task] = None
                await writer.drain()
                writer.close()
                await writer.wait_closed()
        except (OSError, EOFError, TimeoutError, asyncio.LimitOverrunError, asyncio.CancelledError) as error:
            logger.debug("a connection to the metrics ended early: %r", error)
        finally:
            self._connections.discard(task)
            self._idle.pop(task, None)
            writer.transport.abort()

    def _end_longest_idle(self) -> bool:
        """Ends the connection that has waited longest for its client; False if none waits."""
        if not self._idle:
            return False
        task = next(iter(self._idle))
        del self._idle[task]
        self._connections.discard(task)
        task.cancel()
        return True

    async def _answer(self, head: bytes) -> bytes:
        environment = _parse(head)
        if environment is None:
            return _response("400 Bad Request", [], b"this is not an HTTP request\n")
        async with self._turn:
            await asyncio.sleep(self._earliest - time.monotonic())
            started = time.monotonic()
            answer = self._render(environment)
            ended = time.monotonic()
            self._earliest = ended + _PAUSE_FACTOR * (ended - started)
        return answer

    def _render(self, environment: dict[str, str]) -> bytes:
        started: list[tuple[str, list[tuple[str, str]]]] = []
        try:
            body = b"".join(self._application(environment, lambda *arguments: started.append(arguments)))
        except Exception:
            logger.exception("the metrics cannot be shown")
            return _response("500 Internal Server Error", [], b"the metrics cannot be shown; see the server's log\n")
        return _response(*started[0], body)

    def close(self) -> None:
        """Ends all connections."""
        for connection in self._connections:
            connection.cancel()


def _parse(head: bytes) -> dict[str, str] | None:
    """The WSGI environment of a request; None if it is not an HTTP request."""
    line, _, rest = head.partition(b"\r\n")
    try:
        method, target, protocol = line.decode("ascii").split(" ")
        fields: Any = http.client.parse_headers(io.BytesIO(rest))
    except (ValueError, http.client.HTTPException):
        return None
    if not protocol.startswith("HTTP/"):
        return None
    path, _, query = target.partition("?")
    return {
        "REQUEST_METHOD": method,
        "PATH_INFO": path,
        "QUERY_STRING": query,
        "HTTP_ACCEPT": fields.get("Accept", ""),
        "HTTP_ACCEPT_ENCODING": fields.get("Accept-Encoding", ""),
    }


def _response(status: str, headers: list[tuple[str, str]], body: bytes) -> bytes:
    lines = [
        f"HTTP/1.1 {status}",
        *(f"{name}: {value}" for name, value in headers),
        f"Content-Length: {len(body)}",
        "Connection: close",
    ]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body
