"""Progress of a run: a bar with images/s and the time left on a terminal, otherwise a line now and then."""

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskProgressColumn,
    TimeRemainingColumn,
)
from rich.text import Text

_LINE_SECONDS = 30.0


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.0f} images/s" if speed else "")


class ScoreProgress:
    """Shows on standard error how many rows have been scored. Use it in a `with` and in one thread.

    Args:
        total: Number of rows of the input.
        done: Number of rows that an earlier run scored.
    """

    def __init__(self, total: int, done: int) -> None:
        self._total, self._first, self._done = total, done, done
        self._started = self._printed = time.monotonic()
        console = Console(file=sys.stderr)
        columns = (BarColumn(), TaskProgressColumn(), MofNCompleteColumn(), _Speed(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=console) if console.is_terminal else None
        self._task = self._bar.add_task("", total=total, completed=done) if self._bar else None

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def add(self, rows: int) -> None:
        """Counts rows that have been scored."""
        self._done += rows
        now = time.monotonic()
        if self._bar and self._task is not None:
            self._bar.update(self._task, completed=self._done)
        elif now - self._printed >= _LINE_SECONDS:
            self._printed = now
            minutes = (self._total - self._done) / self.images_per_second / 60
            print(
                f"{self._done:,} of {self._total:,} images ({self._done / self._total:.1%}), "
                f"{self.images_per_second:,.0f} images/s, {minutes:,.1f} min left",
                file=sys.stderr,
                flush=True,
            )

    @property
    def images_per_second(self) -> float:
        """Mean speed since the start of this run."""
        return (self._done - self._first) / max(1e-9, time.monotonic() - self._started)
