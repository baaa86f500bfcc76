"""Writes the answers of `cifar-classify`, row by row: as a table, as lines of JSON, or as CSV."""

import contextlib
import csv
import io
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Protocol

from cifar_core.errors import open_closed_streams, output_may_fail
from service.client.streaming import Row
from service.client.table import print_table

if TYPE_CHECKING:
    from rich.console import Console

# A table needs its rows at hand to choose the widths of its columns, so a long list is printed as several tables.
_TABLE_ROWS = 200


class Writer(Protocol):
    """Writes rows to standard output."""

    def write(self, row: Row) -> None:
        """Writes one row, or keeps it until there are enough of them."""

    def finish(self) -> None:
        """Writes what was kept."""


class TableWriter:
    """Prints a table for each 200 files.

    Args:
        console: Console to print to; None: a new one for standard output.
    """

    def __init__(self, console: "Console | None" = None) -> None:
        self._console = console
        self._rows: list[Row] = []

    def write(self, row: Row) -> None:
        self._rows.append(row)
        if len(self._rows) >= _TABLE_ROWS:
            self.finish()

    def finish(self) -> None:
        rows, self._rows = self._rows, []
        if rows:
            print_table([row.file.label for row in rows], [row.answer for row in rows], self._console)


class JsonWriter:
    """Prints one line of JSON per file: image, classes, error, model_version."""

    def write(self, row: Row) -> None:
        print(json.dumps({"image": str(row.file.path), **asdict(row.answer)}))

    def finish(self) -> None:
        """Nothing was kept."""


class CsvWriter:
    """Prints one line of CSV per file, after a line with the names of the columns.

    Args:
        classes: Largest number of classes per image; each takes two columns.

    Raises:
        ValueError: A row has more classes, because the server's model was replaced by another.
    """

    def __init__(self, classes: int) -> None:
        self._classes = classes
        pairs = [f"{name}_{place}" for place in range(1, classes + 1) for name in ("class", "probability")]
        self._print(["image", *pairs, "error", "model_version"])

    def write(self, row: Row) -> None:
        if len(row.answer.classes) > self._classes:
            raise ValueError(
                f"the answer for {row.file.path} has {len(row.answer.classes)} classes, but the first line of the CSV "
                f"has columns for {self._classes}: the server's model was replaced by one with more classes; run the "
                "command again"
            )
        ranked = [value for ranked in row.answer.classes for value in (ranked.name, f"{ranked.probability:.6g}")]
        padding = [""] * (2 * self._classes - len(ranked))
        self._print([row.file.path, *ranked, *padding, row.answer.error or "", row.answer.model_version])

    def finish(self) -> None:
        """Nothing was kept."""

    @staticmethod
    def _print(values: Sequence[object]) -> None:
        # The writer puts values in quotes that hold characters of its end of line: readers end lines at both.
        line = io.StringIO(newline="")
        csv.writer(line, lineterminator="\r\n").writerow(values)
        print(line.getvalue().removesuffix("\r\n"))


@contextlib.contextmanager
def standard_output() -> Iterator[None]:
    """Lets a command print any file name, and end without a traceback if its output cannot be written.

    Without a standard error, messages are dropped.

    Raises:
        SystemExit: 1, because the reader of standard output, such as `head`, ended first; 2 if a disk is full or the
            program was started with a closed standard output.
    """
    open_closed_streams()
    if sys.stdout is None:
        print("error: standard output is closed, but the rows must be written to it; redirect it", file=sys.stderr)
        raise SystemExit(2)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file name need not be valid text
    with contextlib.suppress(OSError, ValueError):
        os.set_blocking(sys.stdout.fileno(), True)  # otherwise rows are lost while the pipe to the reader is full
    with output_may_fail():
        yield
