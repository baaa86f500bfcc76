"""Rows of the input, and the sources that they come from."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pyarrow as pa
from numpy import uint8
from numpy.typing import NDArray

from cifar_core.pixels import ImageRejected
from service.core.fair_queue import Decoded

KIND_FOLDER, KIND_LIST, KIND_PARQUET = "folder", "list", "parquet"


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


class Source(Protocol):
    """An input, divided into parts by an inventory that was written once.

    Attributes:
        key: Name and type of the key column of the output.
    """

    key: pa.Field

    def write_inventory(self, file: Path, rows_per_part: int) -> None:
        """Lists the input into a Parquet file that fixes the order of the rows and the parts.

        Raises:
            ScoreError: The input cannot be listed or holds no image.
        """

    def part_sizes(self, inventory: Path) -> list[int]:
        """Number of rows of each part."""

    def rows(self, inventory: Path, part: int, batch_size: int) -> Iterator[Rows]:
        """The rows of a part in batches of `batch_size`; the last one may be smaller.

        Raises:
            ScoreError: A Parquet file cannot be read.
        """

    def difference(self, before: Path, now: Path) -> str | None:
        """What differs between two inventories, for a person; None if they are equal."""
