"""Messages that begin, of which all but the last bytes are sent, and that never end."""

import threading
import time
from types import TracebackType
from typing import Self

from tests.attacks.http2 import (
    CLASSIFY,
    DATA,
    END_HEADERS,
    FRAME_BYTES,
    HEADERS,
    Connection,
    ConnectionEnded,
    Target,
    frame,
    grpc_prefix,
    header_block,
)

# Not sent, so that the message stays unfinished.
LAST_BYTES = 1000
ZEROS = bytes(FRAME_BYTES)


class _Staller(threading.Thread):
    """One connection with its unfinished messages."""

    def __init__(self, target: Target, streams: int, size: int, method: str, stop: threading.Event) -> None:
        super().__init__(daemon=True)
        self.sent = 0
        self.open_streams = 0
        self.opened = False
        self.last_progress = time.monotonic()
        self._target, self._streams, self._size, self._method, self._stop_event = target, streams, size, method, stop

    def run(self) -> None:
        try:
            with Connection(self._target) as connection:
                self.opened = True
                connection.receive(1.0)  # the server's settings: how many streams it accepts, and its windows
                remaining = self._open(connection)
                while not self._stop_event.is_set():
                    self.open_streams = len(connection.stream_windows)
                    if self._send(connection, remaining):
                        self.last_progress = time.monotonic()
                        connection.receive(0)
                    else:
                        connection.receive(0.2)
        except ConnectionEnded:
            pass
        finally:
            self.open_streams = 0

    def _open(self, connection: Connection) -> dict[int, int]:
        """Opens the streams; returns the bytes that are still to be sent on each."""
        block = header_block(self._target, self._method)
        remaining = {}
        for _ in range(min(self._streams, connection.max_streams)):
            stream = connection.new_stream()
            prefix = grpc_prefix(self._size)
            connection.send(frame(HEADERS, END_HEADERS, stream, block) + frame(DATA, 0, stream, prefix))
            connection.stream_windows[stream] -= len(prefix)
            connection.connection_window -= len(prefix)
            remaining[stream] = self._size - LAST_BYTES
        return remaining

    def _send(self, connection: Connection, remaining: dict[int, int]) -> int:
        """Sends a frame on each stream, as far as the windows allow; returns the number of bytes."""
        parts, total = [], 0
        for stream in [stream for stream in remaining if stream in connection.stream_windows]:
            size = min(remaining[stream], FRAME_BYTES, connection.stream_windows[stream], connection.connection_window)
            if size <= 0:
                continue
            parts.append(frame(DATA, 0, stream, ZEROS[:size]))
            remaining[stream] -= size
            connection.stream_windows[stream] -= size
            connection.connection_window -= size
            total += size
        if parts:
            connection.send(b"".join(parts))
            self.sent += total
        return total


class StalledMessages:
    """Connections that each stall in the middle of messages, for the length of a `with`.

    Args:
        target: The server.
        connections: Number of connections.
        streams: Unfinished messages on each of them; fewer if the server allows fewer.
        size: Bytes of each message.
        method: That is called.
    """

    def __init__(
        self, target: Target, connections: int = 200, streams: int = 1, size: int = 8 * 2**20, method: str = CLASSIFY
    ) -> None:
        self._stop = threading.Event()
        self._threads = [_Staller(target, streams, size, method, self._stop) for _ in range(connections)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(10)

    @property
    def sent(self) -> int:
        """Bytes of messages that were sent."""
        return sum(thread.sent for thread in self._threads)

    @property
    def connections(self) -> int:
        """Connections that the server accepted."""
        return sum(thread.opened for thread in self._threads)

    @property
    def open_streams(self) -> int:
        """Unfinished messages that the server has not ended."""
        return sum(thread.open_streams for thread in self._threads)

    def wait_until_stalled(self, seconds: float = 60.0, quiet: float = 1.0) -> None:
        """Waits until no connection has sent anything for `quiet` seconds, at most `seconds`."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            newest = max(thread.last_progress for thread in self._threads)
            if time.monotonic() - newest > quiet:
                return
            time.sleep(0.1)

    def wait_until_ended(self, seconds: float) -> float | None:
        """Seconds until the server has ended every unfinished message; None if some are left after `seconds`."""
        began = time.monotonic()
        while time.monotonic() < began + seconds:
            if not self.open_streams:
                return time.monotonic() - began
            time.sleep(0.1)
        return None


def stall(
    target: Target,
    connections: int = 50,
    streams: int = 1,
    size: int = 8 * 2**20,
    method: str = CLASSIFY,
    seconds: float = 5.0,
) -> str:
    """Stalls for a time; what was sent, in words."""
    with StalledMessages(target, connections, streams, size, method) as stalled:
        time.sleep(seconds)
        left = stalled.open_streams
    return f"{stalled.sent / 2**20:,.0f} MiB of messages that never ended; {left} still open after {seconds:g} s"
