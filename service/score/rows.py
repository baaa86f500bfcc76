"""Rows of the input, and the sources that they come from."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import pyarrow as pa
from numpy import uint8
from numpy.typing import NDArray

from cifar_core.pixels import ImageRejected
from service.core.fair_queue import Decoded
from service.score.errors import ScoreError

Kind = Literal["folder", "list", "parquet"]
Content = Literal["auto", "files", "pixels"]

_EXAMPLES = 3


@dataclass(frozen=True)
class FileName:
    """An image file that is read when its batch is computed.

    Attributes:
        path: Path to open, with surrogate escapes if its bytes are not UTF-8.
        size: Size in bytes when the input was listed; 0 if unknown. It limits how many files are read at once.
    """

    path: str
    size: int


@dataclass(frozen=True, eq=False)
class Rows:
    """Consecutive rows of the input: one batch.

    Attributes:
        keys: Key of each row, as it is written to the output.
        files: Image files to decode, or for a row without one the reason; None if the rows hold pixels.
        pixels: uint8 [n, 32, 32, 3] if all rows hold an image, otherwise per row the image or the reason; None if the
            rows hold files.
    """

    keys: pa.Array
    files: Sequence[FileName | bytes | ImageRejected] | None = None
    pixels: NDArray[uint8] | Sequence[Decoded] | None = None


@dataclass
class LeftOut:
    """Files of a folder that are not scored because of their extensions.

    Attributes:
        count: Number of files.
        examples: Names of the first three.
    """

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, name: str) -> None:
        """Counts a file."""
        self.count += 1
        if len(self.examples) < _EXAMPLES:
            self.examples.append(name)


class Source(Protocol):
    """An input, divided into parts by an inventory that was written once.

    Attributes:
        key: Name and type of the key column of the output.
        left_out: Files that are no part of the input; complete after `write_inventory`, or `difference` without one.
    """

    key: pa.Field
    left_out: LeftOut

    def write_inventory(self, file: Path, rows_per_part: int) -> None:
        """Lists the input into a Parquet file that fixes the order of the rows and the parts.

        Raises:
            ScoreError: The input cannot be listed or holds no image.
        """

    def part_sizes(self, inventory: Path) -> list[int]:
        """Number of rows of each part.

        Raises:
            ScoreError: The inventory cannot be read.
        """

    def rows(self, inventory: Path, part: int, batch_size: int) -> Iterator[Rows]:
        """The rows of a part in batches of `batch_size`; the last one may be smaller.

        Raises:
            ScoreError: A Parquet file cannot be read.
        """

    def difference(self, inventory: Path) -> str | None:
        """What differs between an inventory and the present input, for a person; None if nothing does.

        Raises:
            ScoreError: The input cannot be listed, or the inventory cannot be read.
        """


@contextlib.contextmanager
def reading(inventory: Path) -> Iterator[None]:
    """Around code that reads an inventory, which may be removed during the run, or not be there on another machine.

    Raises:
        ScoreError: It cannot be read.
    """
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise ScoreError(f"{inventory}: this file cannot be read: {reason}; restore it and use --resume") from error


def shown(path: str) -> str:
    """A path as valid UTF-8; bytes that are not UTF-8 are escaped."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")
