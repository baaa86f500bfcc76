"""Messages from a worker to its supervisor, through a pipe: each is one line.

The first message is READY, or REFUSED with the reason. After READY the worker's event loop sends heartbeats: HEALTHY,
or STUCK if the engine does not return from a batch.
"""

import asyncio
import enum
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass

logger = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 0.5
# A pipe takes a message of this size as a whole or not at all (PIPE_BUF).
_MAX_BYTES = 4096


class Kind(enum.StrEnum):
    """What a message says."""

    READY = "ready"
    REFUSED = "refused"
    HEALTHY = "healthy"
    STUCK = "stuck"


@dataclass(frozen=True)
class Message:
    """A message, with the reason if it is REFUSED."""

    kind: Kind
    reason: str = ""


class Sender:
    """The worker's end of the pipe. Never waits and never fails: the supervisor may be gone or suspended."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        os.set_inheritable(descriptor, False)
        os.set_blocking(descriptor, False)

    def send(self, kind: Kind, reason: str = "") -> None:
        """Sends a message; a long reason is cut."""
        line = f"{kind} {' '.join(reason.split())}".encode()[: _MAX_BYTES - 1] + b"\n"
        try:
            os.write(self._descriptor, line)
        except OSError as error:
            logger.debug("the supervisor does not read: %s", error)

    async def beat(self, healthy: Callable[[], bool]) -> None:
        """Sends heartbeats for ever.

        Args:
            healthy: Returns whether the engine works.
        """
        while True:
            self.send(Kind.HEALTHY if healthy() else Kind.STUCK)
            await asyncio.sleep(HEARTBEAT_SECONDS)


class Receiver:
    """The supervisor's end of the pipe."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._rest = b""
        os.set_blocking(descriptor, False)

    def fileno(self) -> int:
        """The file descriptor."""
        return self._descriptor

    def receive(self) -> list[Message] | None:
        """The messages that have arrived since the last call; None if the other end is closed."""
        try:
            data = os.read(self._descriptor, 65536)
        except BlockingIOError:
            return []
        if not data:
            return None
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [message for line in lines if (message := _parse(line.decode(errors="replace")))]

    def close(self) -> None:
        """Closes this end."""
        os.close(self._descriptor)


def _parse(line: str) -> Message | None:
    """A message; None for a line that is none, which a library loaded by the worker may have written."""
    kind, _, reason = line.partition(" ")
    if kind not in set(Kind):
        logger.warning("a worker sent an unknown message: %r", line[:80])
        return None
    return Message(Kind(kind), reason)
