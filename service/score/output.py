"""The output folder: the parts, and what a later run needs to continue.

    part-000000.parquet   rows of the first part, and so on
    _score.json           input, model and options, SHA-256 of _inputs.parquet; written after _inputs.parquet
    _inputs.parquet       the inventory: the order of the rows and the parts
    .lock                 locked by the run that writes to the folder; empty

Every file is written under another name and then renamed, so a part that exists is complete. No Parquet file of the
folder is parsed before a checksum of all of its bytes is compared. Programs that read a folder of Parquet files leave
out names that begin with `_` or `.`.
"""

import contextlib
import fcntl
import functools
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from cifar_core.files import open_without_waiting, read_regular, sync_folder, to_json
from service.score.description import Description, read_description
from service.score.errors import ScoreError
from service.score.part_checksum import is_whole, with_checksum

# Longer than the names of all classes that an answer of the server can hold.
_MAX_DESCRIPTION_BYTES = 2**29
_PART = b"cifar.part"
"""Names the part in the metadata of its file."""
_WAY_OUT = "restore it from a copy, or score into another folder"


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
            stream = (self.path / ".lock").open("a")  # "w" would change the file of a finished run
        except OSError as error:
            raise ScoreError(f"{self.path}: this folder cannot be written to ({error.strerror})") from error
        with stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ScoreError(
                    f"{self.path}: another run writes to this folder; wait for it, or choose another"
                ) from None
            except OSError as error:
                raise ScoreError(
                    f"{self.path}/.lock: this file cannot be locked ({error.strerror}); choose a folder on a file "
                    "system with locks"
                ) from error
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
        if self.part(0).name in others and self.inventory.exists():
            raise ScoreError(
                f"{self._description}: this file is missing, but there are parts of a run beside it; {_WAY_OUT}"
            )
        if others:
            raise ScoreError(f"{self.path}: the folder is not empty ({others[0]}); choose a new folder for the output")

    def description(self) -> Description:
        """The content of _score.json.

        Raises:
            ScoreError: The file cannot be read, is damaged or of another version.
        """
        try:
            return read_description(_limited(self._description))
        except OSError as error:
            reason = f"this file cannot be read ({error.strerror}); permit reading it,"
        except ValueError as error:
            reason = f"this file is damaged, or another version of this program wrote it ({error});"
        raise ScoreError(f"{self._description}: {reason} {_WAY_OUT}")

    def write_description(self, description: Description) -> None:
        """Writes _score.json.

        Raises:
            ScoreError: The file cannot be written.
        """
        content = to_json(description.model_dump(mode="json"))
        self._replace(self._description, lambda partial: partial.write_bytes(content))

    def write_inventory(self, write: Callable[[Path], object]) -> str:
        """Writes _inputs.parquet and returns its SHA-256.

        Args:
            write: Writes the inventory to the path that it is given.

        Raises:
            ScoreError: The file cannot be written, or `write` raises it.
        """
        self._replace(self.inventory, write)
        return _sha256(self.inventory)

    def check_inventory(self, sha256: str) -> None:
        """Compares _inputs.parquet with the SHA-256 in _score.json.

        Raises:
            ScoreError: It cannot be read, or it is not the file that the run wrote.
        """
        try:
            if _sha256(self.inventory) == sha256:
                return
            reason = f"this file is damaged: its SHA-256 is not the one in {self._description.name};"
        except OSError as error:
            reason = f"this file cannot be read ({error.strerror}); permit reading it,"
        raise ScoreError(f"{self.inventory}: {reason} {_WAY_OUT}")

    def part(self, number: int) -> Path:
        """The file of a part."""
        return self.path / f"part-{number:06d}.parquet"

    def write_part(self, number: int, table: pa.Table) -> None:
        """Writes a part. Its file is complete or does not exist.

        Raises:
            ScoreError: The file cannot be written.
        """
        sink = pa.BufferOutputStream()
        metadata = (table.schema.metadata or {}) | {_PART: self._identity(number)}
        pq.write_table(table.replace_schema_metadata(metadata), sink, compression="zstd")
        content = with_checksum(sink.getvalue().to_pybytes())
        self._replace(self.part(number), lambda partial: partial.write_bytes(content))

    def _identity(self, number: int) -> bytes:
        """What a part says of itself, so that a part of another run or with another number is recognised."""
        return f"{number} of {self._run}".encode()

    @functools.cached_property
    def _run(self) -> str:
        """SHA-256 of what all parts of the run have in common: input, inventory, model and options."""
        common = self.description().model_dump(mode="json", exclude={"rows", "failed_rows"})
        return hashlib.sha256(to_json(common)).hexdigest()

    def written_parts(self, sizes: Sequence[int]) -> dict[int, int]:
        """The parts that need not be computed. Reads them to compare their checksums.

        Args:
            sizes: Number of rows of each part.

        Returns:
            By number of the part, how many of its rows have an error. Parts that are damaged are left out.

        Raises:
            ScoreError: There is no permission to read a part.
        """
        found = ((number, self._failed_rows(number, rows)) for number, rows in enumerate(sizes))
        return {number: failed for number, failed in found if failed is not None}

    def _failed_rows(self, number: int, rows: int) -> int | None:
        """Number of rows of a part that have an error; None if the part must be computed."""
        part = self.part(number)
        try:
            with open(part, "rb", opener=open_without_waiting) as stream:
                if not is_whole(stream):
                    return None
                metadata = pq.read_metadata(stream)
        except PermissionError as error:
            raise ScoreError(f"{part}: this file cannot be read ({error.strerror}); permit reading it") from error
        except OSError:
            return None
        if metadata.num_rows != rows or (metadata.metadata or {}).get(_PART) != self._identity(number):
            return None
        column = metadata.schema.names.index("error")
        groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
        return int(sum(group.num_rows - group.column(column).statistics.null_count for group in groups))

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
            sync_folder(self.path)
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise ScoreError(
                f"{file}: this file cannot be written ({error.strerror or error}); free some space or permit writing, "
                "then continue with --resume"
            ) from error


def _limited(file: Path) -> bytes:
    """The content of _score.json. Raises OSError, or ValueError if it is too long."""
    if (size := file.stat().st_size) > _MAX_DESCRIPTION_BYTES:
        raise ValueError(f"it has {size:,} bytes; at most {_MAX_DESCRIPTION_BYTES:,} are allowed")
    return read_regular(file)


def _sha256(file: Path) -> str:
    with open(file, "rb", opener=open_without_waiting) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def partial_of(file: Path) -> Path:
    """A name for an unfinished file that no other process uses; it begins with a dot."""
    return file.with_name(f".{file.name}.{os.uname().nodename}-{os.getpid()}.partial")


def is_partial(file: Path) -> bool:
    """Whether this is an unfinished file."""
    return file.name.startswith(".") and file.name.endswith(".partial")
