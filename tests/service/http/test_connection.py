"""A connection of the HTTP server, without the server around it."""

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import cast

import h11
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
