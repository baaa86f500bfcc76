"""Records for each connection when it last called, and the answers that it has not read.

gRPC keeps an answer in memory until the client's flow control lets it be sent, which a client can delay for as long as
its connection lives. Calls of a connection that does not read its answers are refused.
"""

import collections
import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

from service.errors import Overloaded

# Longest time for which a connection may read none of its answers: in general, and while gRPC holds many bytes.
MAX_UNREAD_SECONDS = 10.0
MAX_UNREAD_SECONDS_WHEN_FULL = 1.0
MAX_UNREAD_BYTES = 64 * 2**20
RETRY_SECONDS = 1.0
# Number of connections whose last call is remembered.
MAX_REMEMBERED = 4096


@dataclass(slots=True)
class _Unread:
    answers: int = 0
    progress: float = 0.0  # when an answer was last sent, or the first began to wait


class Connections:
    """The connections that call, by the address of the client's end."""

    def __init__(self) -> None:
        self._unread: dict[str, _Unread] = {}
        self._bytes = 0
        self._last_call: dict[str, float] = {}
        self._held: collections.Counter[str] = collections.Counter()

    def check(self, connection: str) -> None:
        """Accepts a call of a connection.

        Raises:
            Overloaded: The client does not read the answers to its earlier calls.
        """
        now = self._last_call[connection] = time.monotonic()
        if len(self._last_call) > MAX_REMEMBERED:
            del self._last_call[next(iter(self._last_call))]
        unread = self._unread.get(connection)
        if unread is None:
            return
        full = self._bytes > MAX_UNREAD_BYTES
        if now - unread.progress > (MAX_UNREAD_SECONDS_WHEN_FULL if full else MAX_UNREAD_SECONDS):
            raise Overloaded(
                f"{unread.answers} answers on this connection have not been read: read them, then retry", RETRY_SECONDS
            )

    def check_answer(self, connection: str) -> None:
        """Accepts an answer that is about to be sent.

        Raises:
            Overloaded: gRPC holds as many unread bytes as it may, and some of them are this client's.
        """
        unread = self._unread.get(connection)
        if unread is not None and self._bytes > MAX_UNREAD_BYTES:
            raise Overloaded(
                f"{unread.answers} answers on this connection have not been read: read them, then retry", RETRY_SECONDS
            )

    def sending(self, connection: str, size: int) -> None:
        """Records that an answer of `size` bytes was given to gRPC."""
        unread = self._unread.get(connection)
        if unread is None:
            unread = self._unread[connection] = _Unread(progress=time.monotonic())
        unread.answers += 1
        self._bytes += size

    def sent(self, connection: str, size: int) -> None:
        """Records that an answer of `size` bytes was sent, or that its call ended without it."""
        self._bytes -= size
        unread = self._unread[connection]
        unread.answers -= 1
        if unread.answers:
            unread.progress = time.monotonic()
        else:
            del self._unread[connection]

    @contextlib.contextmanager
    def held(self, connection: str) -> Iterator[None]:
        """Counts a call that is kept waiting, for the length of a `with` block."""
        self._held[connection] += 1
        try:
            yield
        finally:
            self._held[connection] -= 1

    def all_held(self, since: float) -> bool:
        """Whether each connection that called since a time, on time.monotonic(), has a call that is kept waiting."""
        return all(self._held[connection] for connection, last in self._last_call.items() if last >= since)
