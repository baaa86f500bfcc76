"""Writes rows in a thread: while the reader of the rows pauses, calls to the server go on and keep their deadlines."""

import asyncio
import queue
import threading
import time
from types import TracebackType
from typing import Self

from service.client.output import Writer
from service.client.streaming import Row

# Rows that wait to be written.
_MAX_ROWS = 256
_CHECK_SECONDS = 0.01
# How long an interrupted command waits for the reader of its rows.
_INTERRUPTED_SECONDS = 1.0


class WritingThread:
    """Gives rows to a writer in their order: `async with thread.using(writer): await thread.write(row)`.

    The end of the block waits until all rows are written, but only a second if the task was cancelled.

    Attributes:
        is_stuck: Whether the block ended although the thread still waits for the reader of its output.
    """

    def __init__(self) -> None:
        self.is_stuck = False
        self._rows: queue.Queue[Row | None] = queue.Queue(_MAX_ROWS)
        self._error: BaseException | None = None

    def using(self, writer: Writer) -> Self:
        """Prepares the thread for one block."""
        # A daemon, because a process that is interrupted must not wait for a reader.
        self._thread = threading.Thread(target=self._run, args=(writer,), name="rows", daemon=True)
        return self

    async def __aenter__(self) -> Self:
        self._thread.start()
        self.is_stuck = True
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        end = time.monotonic() + _INTERRUPTED_SECONDS if isinstance(error, asyncio.CancelledError) else None
        if await self._ended(end):
            self.is_stuck = False
        if error is None and self._error is not None:
            raise self._error

    async def write(self, row: Row) -> None:
        """Waits until there is space for a row.

        Raises:
            OSError: The output cannot be written.
            ValueError: The writer refuses a row; see `CsvWriter`.
        """
        while self._rows.full() and self._thread.is_alive():
            await asyncio.sleep(_CHECK_SECONDS)
        if self._error is not None:
            raise self._error
        self._rows.put_nowait(row)

    async def _ended(self, end: float | None) -> bool:
        """Lets the thread write what is left; False if it has not at the time `end`, on time.monotonic()."""
        is_told = False
        while self._thread.is_alive():
            if not is_told and not self._rows.full():
                self._rows.put_nowait(None)
                is_told = True
            if end is not None and time.monotonic() > end:
                return False
            await asyncio.sleep(_CHECK_SECONDS)
        return True

    def _run(self, writer: Writer) -> None:
        try:
            while (row := self._rows.get()) is not None:
                writer.write(row)
            writer.finish()
        except BaseException as error:  # noqa: BLE001 -- the task that writes rows raises it
            self._error = error
