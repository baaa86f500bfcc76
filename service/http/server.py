"""The HTTP server: its sockets, its connections, and how it starts and stops."""

import asyncio
import collections
import contextlib
import email.utils
import logging
import socket
import time
from collections.abc import Callable, Coroutine
from typing import Any, cast

from uvicorn.config import Config
from uvicorn.server import ServerState

from service import ports
from service.certificates import Certificates
from service.core.inference import Inference
from service.core.metrics import Metrics
from service.http.app import application
from service.http.connection import IDLE_SECONDS, MAX_UNREAD_BYTES, Connection
from service.http.requests import Requests
from service.receiving import Receiver
from service.settings import Settings
from service.tokens import Tokens
from service.tracing import Tracing

logger = logging.getLogger(__name__)

HANDSHAKE_SECONDS = 10.0
_TLS_CLOSE_SECONDS = 2.0
_CHECK_SECONDS = 0.5
# While nearly all connections are in use, idle ones are looked for at most this often.
_SEARCH_SECONDS = 0.1
# Pause after a connection could not be accepted, for example because no file descriptor is free.
_ACCEPT_PAUSE_SECONDS = 0.1
# Time for clients that have begun to connect to a server that stops.
_CONNECTING_SECONDS = 0.05
# A server that stops waits until each client that sent a request within this time has been told to connect elsewhere,
_ACTIVE_SECONDS = 2.0
# or until no client has sent a request for this time and no new connection waits for its first request,
_QUIET_SECONDS = 0.5
# but no longer than this.
_MAX_HOLD_SECONDS = 5.0


class HttpServer:
    """HTTP on one port. Create it in a running event loop.

    Args:
        settings: All options.
        inference: Answers the requests.
        metrics: Counts the requests.
        receiver: Reads their bodies.
        tokens: The valid tokens; None if requests need none.
        certificates: For TLS; None for plaintext.
        tracing: Makes spans; None if tracing is off.
        shares_port: Whether other processes listen on the same port.
        healthy: Returns whether the engine works.
        keep: Wraps tasks that last as long as the server, and stops it if one of them fails.

    Attributes:
        port: The port that it listens on.

    Raises:
        StartError: It cannot listen on the port.
    """

    def __init__(
        self,
        settings: Settings,
        inference: Inference,
        metrics: Metrics,
        receiver: Receiver,
        tokens: Tokens | None,
        certificates: Certificates | None,
        tracing: Tracing | None,
        *,
        shares_port: bool,
        healthy: Callable[[], bool],
        keep: Callable[[Coroutine[Any, Any, None]], Coroutine[Any, Any, None]],
    ) -> None:
        self._requests = Requests(
            metrics,
            receiver,
            tokens,
            tracing,
            max_body_bytes=settings.max_message_bytes,
            max_connection_age=settings.max_connection_age,
        )
        app = application(self._requests, inference, healthy, health_without_token=settings.health_without_token)
        self._state = ServerState()
        self._config = _configuration(app)
        self._certificates, self._keep = certificates, keep
        self._max_connections = settings.max_connections
        self._max_age = settings.max_connection_age
        self._host = settings.http_address
        self._listeners = ports.listen(settings.http_address, settings.http_port or 0, shares_port=shares_port)
        self.port: int = self._listeners[0].getsockname()[1]
        self._idle: collections.deque[Connection] = collections.deque()  # found by the last search
        self._next_search = 0.0
        self._searched = 0.0
        self._opening: set[asyncio.Task[None]] = set()
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def _connections(self) -> set[Connection]:
        """All open connections, without those in the handshake of TLS."""
        return cast(set[Connection], self._state.connections)

    @property
    def in_flight(self) -> int:
        """Number of requests accepted whose answers have not been sent yet."""
        return self._requests.in_flight

    @property
    def answered(self) -> int:
        """Number of requests answered with 200."""
        return self._requests.answered

    async def start(self) -> None:
        """Accepts connections and answers requests from now on."""
        for listener in self._listeners:
            self._tasks.append(asyncio.create_task(self._keep(self._accept(listener))))
        self._tasks.append(asyncio.create_task(self._keep(self._watch())))
        scheme = "https" if self._certificates else "http"
        url = f"{scheme}://{ports.address(self._host, self.port)}/"
        logger.info("HTTP at %s", url, extra={"http_port": self.port, "http_url": url})

    async def drain(self, grace: float) -> int:
        """Refuses new requests and waits until the answers to accepted ones are sent, at most `grace` seconds.

        Returns:
            The number of requests that are still unanswered.
        """
        end = time.monotonic() + grace
        left = await self._requests.drain(grace)
        while (unsent := self._unsent()) and time.monotonic() < end:
            await asyncio.sleep(0.01)
        return left + unsent

    async def close(self, *, at_once: bool) -> None:
        """Tells clients that their connections accept no more requests, then closes the connections."""
        if not at_once:
            await self._tell_clients()
            for listener in self._listeners:
                ports.hold_new_connections(listener)
            await asyncio.sleep(_CONNECTING_SECONDS)
        for task in self._tasks:
            task.cancel()
        for listener in self._listeners:
            self._accept_waiting(listener)
            listener.close()
        if not at_once:
            await self._tell_clients()  # those that were connecting meanwhile
        for connection in list(self._connections):
            if at_once or not connection.is_idle:
                connection.abort()
            else:
                connection.close()

    # Accepting

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                client, _ = await loop.sock_accept(listener)
            except OSError as error:  # no file descriptor is free, or the client has vanished already
                logger.warning("a connection could not be accepted: %s", error.strerror)
                await asyncio.sleep(_ACCEPT_PAUSE_SECONDS)
                continue
            self._begin(client)
            await asyncio.sleep(0)  # `sock_accept` lets no other task run while connections wait to be accepted

    def _accept_waiting(self, listener: socket.socket) -> None:
        """Accepts the connections that wait to be accepted. They would be reset otherwise."""
        with contextlib.suppress(OSError):  # no more of them wait
            while True:
                client, _ = listener.accept()
                client.setblocking(False)
                self._begin(client)

    def _begin(self, client: socket.socket) -> None:
        if len(self._connections) + len(self._opening) >= self._max_connections and not self._end_longest_idle():
            client.close()
            return
        task = asyncio.create_task(self._open(client))
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)

    async def _open(self, client: socket.socket) -> None:
        context = self._certificates.current.context if self._certificates else None
        task = asyncio.current_task()

        def connection() -> Connection:
            # From when it is one of the connections, it is no longer counted as one that is being opened.
            return Connection(self._config, self._state, on_open=lambda: self._opening.discard(cast(Any, task)))

        tls = {"ssl_handshake_timeout": HANDSHAKE_SECONDS, "ssl_shutdown_timeout": _TLS_CLOSE_SECONDS}
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                connection, client, ssl=context, **(tls if context else {})
            )
        except OSError as error:  # the client has vanished, or does not speak TLS, or has no valid certificate
            logger.debug("a connection ended before its first request: %s", error)
            client.close()

    def _end_longest_idle(self) -> bool:
        """Ends the connection that has been idle for longest, so that silent clients cannot lock others out."""
        now = time.monotonic()
        if not self._idle and now >= self._next_search:
            idle = [connection for connection in self._connections if connection.is_idle and not connection.unread]
            rare = len(idle) < len(self._connections) // 10
            self._next_search = now + (_SEARCH_SECONDS if rare else 0.0)
            self._searched = now
            self._idle.extend(sorted(idle, key=lambda connection: connection.idle_since))
        while self._idle:
            connection = self._idle.popleft()
            still_idle = connection.is_idle and not connection.unread and connection.idle_since <= self._searched
            if connection in self._connections and still_idle:
                connection.abort()
                self._connections.discard(connection)
                return True
        return False

    # Watching

    async def _watch(self) -> None:
        while True:
            self._state.default_headers = [(b"date", email.utils.formatdate(usegmt=True).encode())]
            self._check(time.monotonic())
            await asyncio.sleep(_CHECK_SECONDS)

    def _check(self, now: float) -> None:
        """Ends connections whose clients are too slow, and idle ones that are too old."""
        full = sum(connection.unread for connection in self._connections) > MAX_UNREAD_BYTES
        for connection in self._connections:
            if connection.overdue(now, full=full):
                logger.debug("connection of %s: the client is too slow", connection.peer)
                connection.abort()
            elif connection.is_idle and connection.age(now) > self._max_age:
                connection.close()

    # Stopping

    def _unsent(self) -> int:
        return sum(connection.unread > 0 for connection in self._connections)

    async def _tell_clients(self) -> None:
        """Waits until active clients have sent another request, whose answer says that the connection is closed."""
        began = time.monotonic()
        while True:
            now = time.monotonic()
            active = [
                each
                for each in self._connections
                if each.idle_since > began - _ACTIVE_SECONDS and not each.transport.is_closing()
            ]
            last = max((connection.idle_since for connection in active), default=began)
            # A client that has just connected is about to send a request, even if its machine is busy.
            new = any(not each.last_request and each.age(now) < _ACTIVE_SECONDS for each in active)
            quiet = not self._opening and not new and now - max(last, began) > _QUIET_SECONDS
            if quiet or not (active or self._opening) or now - began > _MAX_HOLD_SECONDS:
                return
            await asyncio.sleep(0.01)


def _configuration(app: object) -> Config:
    # Requests that are not HTTP are the fault of their clients, and are not logged.
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    config = Config(
        app,  # type: ignore[arg-type]
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=IDLE_SECONDS,
    )
    config.load()
    return config
