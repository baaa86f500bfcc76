"""The output folder: the parts, and what a later run needs to continue.

    part-000000.parquet   rows of the first part, and so on
    _score.json           input, model and options; written after _inputs.parquet
    _inputs.parquet       the inventory: the order of the rows and the parts

Every file is written under another name and then renamed, so a part that exists is complete. Programs that read a
folder of Parquet files leave out names that begin with `_` or `.`.
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from service.score.errors import ScoreError

FORMAT = 1
"""Version of the layout of the folder."""

Description = dict[str, Any]
"""Content of _score.json: `format`, `input`, `model`, `options`; and at the end of the run `rows` and `failed_rows`."""


class OutputFolder:
    """The files of one run.

    Args:
        path: The folder; it need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.inventory = path / "_inputs.parquet"
        self._description = path / "_score.json"

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Creates the folder if necessary, and keeps other runs out of it.

        Raises:
            ScoreError: Another run writes to it, or it cannot be created.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            stream = (self.path / ".lock").open("w")
        except OSError as error:
            raise ScoreError(f"{self.path}: this folder cannot be written to ({error.strerror})") from error
        with stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ScoreError(
                    f"{self.path}: another run writes to this folder; wait for it, or choose another"
                ) from None
            yield

    def is_started(self) -> bool:
        """Whether a run was started here."""
        return self._description.exists()

    def check_empty(self) -> None:
        """Refuses a folder that holds anything else.

        Raises:
            ScoreError: It holds files that no run of this program wrote.
        """
        ours = {self.inventory.name, ".lock"}
        others = sorted(file.name for file in self.path.iterdir() if file.name not in ours and not is_partial(file))
        if others:
            raise ScoreError(f"{self.path}: the folder is not empty ({others[0]}); choose a new folder for the output")

    def description(self) -> Description:
        """The content of _score.json.

        Raises:
            ScoreError: The file is damaged or of another version.
        """
        try:
            value = json.loads(self._description.read_bytes())
        except (OSError, ValueError) as error:
            raise ScoreError(f"{self._description}: this file is damaged ({error}); score anew, elsewhere") from error
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise ScoreError(
                f"{self._description}: another version of this program wrote this file; score anew, elsewhere"
            )
        return value

    def write_description(self, description: Description) -> None:
        """Writes _score.json.

        Raises:
            ScoreError: The file cannot be written.
        """
        content = (json.dumps(description, indent=2, ensure_ascii=False) + "\n").encode()
        self._replace(self._description, lambda partial: partial.write_bytes(content))

    def write_inventory(self, write: Callable[[Path], object]) -> None:
        """Writes _inputs.parquet.

        Args:
            write: Writes the inventory to the path that it is given.

        Raises:
            ScoreError: The file cannot be written, or `write` raises it.
        """
        self._replace(self.inventory, write)

    @contextlib.contextmanager
    def other_inventory(self, write: Callable[[Path], object]) -> Iterator[Path]:
        """A second inventory, to compare with that of the run, until the end of a `with`.

        Raises:
            ScoreError: The file cannot be written, or `write` raises it.
        """
        file = partial_of(self.inventory)
        try:
            try:
                write(file)
            except OSError as error:
                raise ScoreError(f"{file}: cannot be written: {error.strerror or error}") from error
            yield file
        finally:
            file.unlink(missing_ok=True)

    def part(self, number: int) -> Path:
        """The file of a part."""
        return self.path / f"part-{number:06d}.parquet"

    def write_part(self, number: int, table: pa.Table) -> None:
        """Writes a part. Its file is complete or does not exist.

        Raises:
            ScoreError: The file cannot be written.
        """

        def write(partial: Path) -> None:
            pq.write_table(table, partial, compression="zstd", write_page_checksum=True)

        self._replace(self.part(number), write)

    def is_written(self, number: int, rows: int) -> bool:
        """Whether a part has been written and has this many rows. A damaged file counts as not written.

        Reads the whole file to compare the checksums of its pages.
        """
        try:
            with pq.ParquetFile(self.part(number), page_checksum_verification=True) as file:
                return bool(sum(batch.num_rows for batch in file.iter_batches()) == rows)
        except FileNotFoundError:
            return False
        except (OSError, pa.ArrowException):
            return False  # the part is computed again and replaces this file

    def failed_rows(self, number: int) -> int:
        """Number of rows of a part that have an error, from the statistics in its file."""
        metadata = pq.read_metadata(self.part(number))
        column = metadata.schema.names.index("error")
        groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
        return sum(group.num_rows - group.column(column).statistics.null_count for group in groups)

    def remove_partial_files(self) -> None:
        """Removes what a killed run left."""
        for file in self.path.iterdir():
            if is_partial(file):
                file.unlink(missing_ok=True)

    def _replace(self, file: Path, write: Callable[[Path], object]) -> None:
        partial = partial_of(file)
        try:
            write(partial)
            with partial.open("rb") as stream:
                os.fsync(stream.fileno())
            partial.replace(file)
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise ScoreError(
                f"{file}: this file cannot be written ({error.strerror or error}); free some space or permit writing, "
                "then continue with --resume"
            ) from error


def partial_of(file: Path) -> Path:
    """A name for an unfinished file that no other process uses; it begins with a dot."""
    return file.with_name(f".{file.name}.{os.uname().nodename}-{os.getpid()}.partial")


def is_partial(file: Path) -> bool:
    """Whether this is an unfinished file."""
    return file.name.startswith(".") and file.name.endswith(".partial")
