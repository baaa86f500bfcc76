"""A connection of the HTTP server, without the server around it."""

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Coroutine
from types import SimpleNamespace
from typing import Any, cast

import h11
import pytest
import trustme
from uvicorn.config import Config
from uvicorn.server import ServerState

from service.http.connection import Connection, _Parser


async def application(scope: object, receive: object, send: object) -> None:
    raise AssertionError("no request is sent")


@contextlib.asynccontextmanager
async def tls_connection() -> AsyncIterator[tuple[Connection, ServerState, asyncio.Transport]]:
    """A connection as the server sees it, the open connections, and the client's end of it."""
    authority = trustme.CA()
    context, trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context()
    authority.issue_cert("localhost").configure_cert(context)
    authority.configure_trust(trusting)
    config = Config(application, http="h11", ws="none", lifespan="off", log_config=None)  # type: ignore[arg-type]
    config.load()
    state, (ours, theirs) = ServerState(), socket.socketpair()
    accepted = asyncio.get_running_loop().connect_accepted_socket(lambda: Connection(config, state), ours, ssl=context)
    opened = asyncio.open_connection(sock=theirs, ssl=trusting, server_hostname="localhost")
    (_, connection), (_, writer) = await asyncio.gather(accepted, opened)
    transport = cast(asyncio.Transport, writer.transport)
    yield connection, state, transport
    transport.abort()


def run(test: Callable[[], Coroutine[None, None, None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 10))


def test_unread_bytes_of_a_tls_connection_can_be_asked_for_until_it_is_gone():
    async def test() -> None:
        async with tls_connection() as (connection, state, client):
            client.abort()
            looked = 0
            while state.connections:  # once in each iteration of the event loop
                assert connection.unread == 0
                looked += 1
                await asyncio.sleep(0)
            assert looked > 1

    run(test)


def test_a_tls_connection_that_is_closed_twice_while_its_client_does_not_answer_can_still_be_ended():
    async def test() -> None:
        async with tls_connection() as (connection, state, client):
            client.pause_reading()  # so it does not confirm that the connection is closed
            for _ in range(3):
                connection.close()
                assert connection.unread >= 0
                await asyncio.sleep(0)
            assert state.connections
            connection.abort()
            while state.connections:
                await asyncio.sleep(0)

    run(test)


def test_the_limit_of_chunks_holds_for_each_request_of_a_connection():
    parser = _Parser()
    head = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    for _ in range(3):
        parser.receive_data(head + b"1\r\nx\r\n" * 300 + b"0\r\n\r\n")
        while not isinstance(parser.next_event(), h11.EndOfMessage):
            pass
        parser.send(h11.Response(status_code=200, headers=[("Content-Length", "0")]))
        parser.send(h11.EndOfMessage())
        parser.start_next_cycle()


# How long a client may take, as docs/security.md says


class Transport(asyncio.Transport):
    """A transport without a socket.

    Attributes:
        unread: Bytes that the client has not read.
    """

    unread = 0

    def get_write_buffer_size(self) -> int:
        return self.unread

    def is_closing(self) -> bool:
        return False

    def resume_reading(self) -> None:
        pass

    def write(self, data: bytes | bytearray | memoryview) -> None:
        pass


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The time that connections see, in seconds."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr("service.http.connection.time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def opened() -> tuple[Connection, Transport]:
    """A connection that answers each request at once, whether or not its body has arrived."""

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body"})

    config = Config(answer, http="h11", ws="none", lifespan="off", log_config=None)
    config.load()
    connection, transport = Connection(config, ServerState()), Transport()
    connection.connection_made(transport)
    return connection, transport


async def request(connection: Connection, body: bytes = b"", length: int = 0) -> None:
    """Sends a request with the beginning of a body of this length, and waits until it is answered."""
    connection.data_received(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % length + body)
    while not connection.is_idle:
        await asyncio.sleep(0)


def assert_overdue_after(connection: Connection, seconds: float, since: float, *, full: bool = False) -> None:
    assert not connection.overdue(since + seconds, full=full)
    assert connection.overdue(since + seconds + 0.01, full=full)


def test_the_headers_of_the_first_request_have_ten_seconds_from_the_start_of_the_connection(clock):
    async def test() -> None:
        connection, _ = opened()
        assert_overdue_after(connection, 10, since=1000)
        clock.now = 1009.0
        connection.data_received(b"GET / HT")  # does not extend the time
        assert_overdue_after(connection, 10, since=1000)

    run(test)


def test_the_headers_of_a_later_request_have_ten_seconds_from_their_first_byte(clock):
    async def test() -> None:
        connection, _ = opened()
        await request(connection)
        clock.now = 1060.0
        connection.data_received(b"GET")
        clock.now = 1065.0
        connection.data_received(b" / HT")
        assert_overdue_after(connection, 10, since=1060)

    run(test)


def test_a_connection_may_be_idle_for_75_seconds_between_two_requests(clock):
    async def test() -> None:
        connection, _ = opened()
        for clock.now in (1005.0, 1075.0):
            await request(connection)
            assert_overdue_after(connection, 75, since=clock.now)

    run(test)


def test_the_rest_of_a_body_that_is_dropped_has_five_seconds_from_the_answer(clock):
    async def test() -> None:
        connection, _ = opened()
        clock.now = 1003.0
        await request(connection, b"12345", length=100)
        assert_overdue_after(connection, 5, since=1003)
        clock.now = 1006.0
        connection.data_received(b"67890")  # does not extend the time
        assert_overdue_after(connection, 5, since=1003)

    run(test)


def test_after_the_rest_of_a_dropped_body_the_next_request_has_its_own_time(clock):
    async def test() -> None:
        connection, _ = opened()
        await request(connection, b"12345", length=10)
        clock.now = 1004.0
        connection.data_received(b"67890")
        assert_overdue_after(connection, 75, since=1000)
        await request(connection, b"12345", length=10)
        clock.now = 1006.0
        connection.data_received(b"67890GET")
        assert_overdue_after(connection, 10, since=1006)

    run(test)


@pytest.mark.parametrize(("full", "seconds"), [(False, 10), (True, 1)])
def test_a_client_that_reads_nothing_of_its_answer_is_overdue_sooner_while_many_bytes_are_unread(clock, full, seconds):
    async def test() -> None:
        connection, transport = opened()
        await request(connection)
        assert not connection.overdue(1000, full=full)
        transport.unread = 500
        assert not connection.overdue(1001, full=full)  # the first time that it has not read something
        assert_overdue_after(connection, seconds, since=1001, full=full)
        transport.unread = 600  # a further answer is no progress
        assert connection.overdue(1001 + seconds + 0.02, full=full)
        transport.unread = 599  # progress
        assert not connection.overdue(1020, full=full)
        assert_overdue_after(connection, seconds, since=1020, full=full)
        transport.unread = 0
        assert not connection.overdue(1050, full=full)

    run(test)


def test_a_client_that_waits_for_its_answer_is_never_overdue(clock):
    async def test() -> None:
        connection, _ = opened()
        connection.data_received(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        assert not connection.is_idle
        assert not connection.overdue(1_000_000, full=True)

    run(test)
