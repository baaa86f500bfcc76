"""Decides when a failed request is sent again: deadlines, the server's hints, and pauses that grow."""

import random
import time
from typing import Any

import grpc

from service.client.answers import ClassificationError

# gRPC itself answers CANCELLED for calls that a stopping server had received but not begun.
_TEMPORARY = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.CANCELLED)
# Statuses that the content of a single call can cause for the whole request that it travels in.
_CAUSED_BY_CONTENT = (
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
)
_FIRST_PAUSE, _LAST_PAUSE = 0.05, 2.0
_MAX_DOUBLINGS = 10  # 2.0**1024 is too large for a float
_PUSHBACK = "grpc-retry-pushback-ms"
# gRPC counts nanoseconds in 63 bits: a deadline more than 292 years away would lie in the past.
_LONGEST_TIMEOUT = 365 * 24 * 3600.0


class RequestFailed(ClassificationError):
    """One attempt to send a request failed.

    Attributes:
        details: The server's message.
        pushback: Value of the metadata grpc-retry-pushback-ms: the server's hint when to send again, in milliseconds.
    """

    def __init__(self, code: grpc.StatusCode, details: str, pushback: str | None = None) -> None:
        super().__init__(code, details)
        self.details, self.pushback = details, pushback

    @classmethod
    def of(cls, error: grpc.RpcError) -> "RequestFailed":
        """The failure that the error of a gRPC call describes."""
        trailing: Any = error.trailing_metadata() or ()  # pairs, although its type says otherwise
        pushback = next((value for key, value in trailing if key == _PUSHBACK), None)
        return cls(error.code(), error.details() or "", pushback)

    def copy(self) -> "RequestFailed":
        """The same failure as an exception of its own, for another call: each raised exception has its traceback."""
        return RequestFailed(self.code, self.details, self.pushback)

    @property
    def may_be_too_large(self) -> bool:
        """Whether the request may exceed a limit of the server; waiting does not help then, smaller requests do.

        gRPC answers RESOURCE_EXHAUSTED for a message that is too large as well; only an overloaded server adds a hint.
        """
        exhausted = self.code is grpc.StatusCode.RESOURCE_EXHAUSTED and self.pushback is None
        return exhausted or self.code is grpc.StatusCode.INVALID_ARGUMENT

    @property
    def temporary(self) -> bool:
        """Whether the same request may succeed later."""
        return self.code in _TEMPORARY and not self.may_be_too_large and self.hint is not None

    @property
    def caused_by_content(self) -> bool:
        """Whether one call's images may have failed the whole request that it shares with other calls."""
        return self.code in _CAUSED_BY_CONTENT and self.pushback is None

    @property
    def hint(self) -> float | None:
        """Seconds that the server asks to wait at least; 0 without a hint, None if it asks not to send again.

        As gRPC's retry design says, a negative or malformed value asks not to send again.
        """
        if self.pushback is None:
            return 0.0
        try:
            milliseconds = int(self.pushback)
        except ValueError:
            return None
        return milliseconds / 1000 if milliseconds >= 0 else None


def deadline_exceeded() -> RequestFailed:
    """The failure of a call whose deadline passed while it waited for a shared request."""
    return RequestFailed(grpc.StatusCode.DEADLINE_EXCEEDED, "the deadline passed before the answer arrived")


def check_timeout(timeout: float | None) -> None:
    """Refuses what is not a time limit.

    Raises:
        ValueError: It is not a number, or NaN, or negative.
    """
    try:
        usable = timeout is None or timeout >= 0  # NaN is not
    except (TypeError, ArithmeticError):  # the second from a Decimal that is no number
        usable = False
    if not usable:
        raise ValueError(f"timeout is {timeout!r}, but must be a number of seconds, 0 or more; use None for no limit")


class Deadline:
    """The moment at which a call gives up.

    Args:
        timeout: Seconds from now, at most a year: a longer timeout means a year. None for never.

    Raises:
        ValueError: `timeout` is not a number, or NaN, or negative.
    """

    def __init__(self, timeout: float | None) -> None:
        check_timeout(timeout)
        self.at = float("inf") if timeout is None else time.monotonic() + float(min(timeout, _LONGEST_TIMEOUT))

    def end(self) -> None:
        """Lets the call give up now."""
        self.at = time.monotonic()

    def remaining(self) -> float | None:
        """Seconds that remain, never quite zero; None if there is no deadline."""
        return None if self.at == float("inf") else max(0.001, self.at - time.monotonic())


class Attempts:
    """Counts the attempts of one request and says how long to wait before the next.

    Args:
        most: Largest number of attempts.
        deadline: Deadline of the call that the request belongs to.
    """

    def __init__(self, most: int, deadline: Deadline) -> None:
        self._most, self._deadline = most, deadline
        self._made = 0

    def pause_after(self, failure: RequestFailed) -> float:
        """Seconds to wait before the next attempt.

        Raises:
            RequestFailed: There is no next attempt; this failure is the outcome.
        """
        self._made += 1
        hint = failure.hint
        if hint is None or not failure.temporary or self._made >= self._most:
            raise failure
        # Pauses double and vary randomly, so that clients that were refused together do not return together.
        doubled = _FIRST_PAUSE * 2.0 ** min(self._made - 1, _MAX_DOUBLINGS)
        pause = hint + min(_LAST_PAUSE, doubled) * random.uniform(0.5, 1.5)
        remaining = self._deadline.remaining()
        if remaining is not None and remaining <= pause:
            raise failure
        return pause
