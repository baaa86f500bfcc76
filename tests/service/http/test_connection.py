"""A connection of the HTTP server, without the server around it."""

import asyncio
import socket
import ssl

import trustme
from uvicorn.config import Config
from uvicorn.server import ServerState

from service.http.connection import Connection


async def application(scope: object, receive: object, send: object) -> None:
    raise AssertionError("no request is sent")


def test_unread_bytes_of_a_tls_connection_can_be_asked_for_until_it_is_gone():
    authority = trustme.CA()
    context, trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context()
    authority.issue_cert("localhost").configure_cert(context)
    authority.configure_trust(trusting)
    config = Config(application, http="h11", ws="none", lifespan="off", log_config=None)  # type: ignore[arg-type]
    config.load()

    async def watch_a_reset() -> int:
        loop, state = asyncio.get_running_loop(), ServerState()
        ours, theirs = socket.socketpair()
        accepted = loop.connect_accepted_socket(lambda: Connection(config, state), ours, ssl=context)
        opened = asyncio.open_connection(sock=theirs, ssl=trusting, server_hostname="localhost")
        (_, connection), (_, writer) = await asyncio.gather(accepted, opened)
        writer.transport.abort()
        looked = 0
        while state.connections:  # once in each iteration of the event loop
            assert connection.unread == 0
            looked += 1
            await asyncio.sleep(0)
        return looked

    assert asyncio.run(asyncio.wait_for(watch_a_reset(), 10)) > 1
