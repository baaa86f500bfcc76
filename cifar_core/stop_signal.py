"""Stopping a training run by SIGINT or SIGTERM without losing its state."""

import signal
from types import FrameType
from typing import Self

from cifar_core.errors import CifarError


class Interrupted(CifarError):
    """A signal stopped the training, after its state was saved.

    Attributes:
        signal_number: the number of the signal.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number


class StopSignal:
    """Records the first SIGINT or SIGTERM, so that the current step can finish; a second one acts immediately.

    Attributes:
        number: the number of the signal; None until there was one.
    """

    def __init__(self) -> None:
        self.number: int | None = None

    def __enter__(self) -> Self:
        self._handlers = {number: signal.signal(number, self._record) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore_handlers()

    def _record(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self._restore_handlers()

    def _restore_handlers(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
