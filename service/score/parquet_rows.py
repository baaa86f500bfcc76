"""Parquet files as input: a column of image files, or a column of raw pixels."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from service.score.errors import ScoreError
from service.score.parquet_columns import files_of, holds_pixels, image_column, pixels_of
from service.score.rows import Content, LeftOut, Rows, reading, shown

_INVENTORY = pa.schema(
    [
        ("file", pa.string()),
        ("size", pa.int64()),  # bytes
        ("changed_ns", pa.int64()),
        ("row_group", pa.int64()),
        ("first_in_group", pa.int64()),
        ("first_in_file", pa.int64()),
        ("rows", pa.int64()),
    ]
)
"""One row per part. A part is a range of rows of one row group, because each row group is read from its beginning."""
# Bytes of a column that are read at a time; larger images are read in smaller batches.
_READ_BYTES = 16 * 2**20
_BUFFER_BYTES = 2**20


@dataclass
class _Position:
    """An open row group: the next batch begins at row `row` of the group."""

    file: str
    row_group: int
    row: int
    batches: Iterator[pa.RecordBatch]
    rest: pa.RecordBatch | None = None


class ParquetRows:
    """One Parquet file, or the .parquet files that lie directly in a folder, in the order of their names.

    Args:
        path: The file or folder.
        column: Column with the images; None if there is only one that can hold them. A struct with a field `bytes`, as
            Hugging Face's data sets have, is a column of image files.
        content: What the column holds; "auto": what its type says.
        key: Column whose values identify the rows in the output; None: FILE:ROW, with rows counted from 0.

    Raises:
        ScoreError: A file is not Parquet, or has no such column, or the files have different columns.
    """

    def __init__(self, path: Path, column: str | None, content: Content, key: str | None) -> None:
        self._path = path
        self._folder = path if path.is_dir() else path.parent
        self._names = parquet_names(path) if path.is_dir() else [path.name]
        self.left_out = _left_out(path) if path.is_dir() else LeftOut()
        schema = self._open(self._names[0]).schema_arrow
        self._column = column if column is not None else image_column(schema, path)
        self._key = key
        self._types: dict[str, pa.DataType] = {}
        for name in (self._column, *([key] if key is not None else [])):
            if (count := schema.names.count(name)) != 1:
                found = f"column '{name}' occurs {count} times" if count else f"there is no column '{name}'"
                raise ScoreError(f"{path}: {found}; the columns are: {', '.join(schema.names)}")
            self._types[name] = schema.field(name).type
        self.key = pa.field("key", pa.string() if key is None else self._types[key])
        self._pixels = holds_pixels(self._column, self._types[self._column], content)
        self._position: _Position | None = None
        self._parts: pa.Table | None = None

    def write_inventory(self, file: Path, rows_per_part: int) -> None:
        """Divides each row group into parts and writes one row per part."""
        parts: list[dict[str, Any]] = []
        for name in self._names:
            found, metadata = (self._folder / name).stat(), self._open(name).metadata
            first_in_file = 0
            for group in range(metadata.num_row_groups):
                rows = metadata.row_group(group).num_rows
                parts += [
                    {
                        "file": name,
                        "size": found.st_size,
                        "changed_ns": found.st_mtime_ns,
                        "row_group": group,
                        "first_in_group": first,
                        "first_in_file": first_in_file + first,
                        "rows": min(rows_per_part, rows - first),
                    }
                    for first in range(0, rows, rows_per_part)
                ]
                first_in_file += rows
        if not parts:
            kind = "folder's .parquet files hold" if self._path.is_dir() else "file holds"
            raise ScoreError(f"{self._path}: the {kind} no rows")
        pq.write_table(pa.Table.from_pylist(parts, _INVENTORY), file)

    def part_sizes(self, inventory: Path) -> list[int]:
        """Number of rows of each part."""
        with reading(inventory):
            sizes: list[int] = pq.read_table(inventory, columns=["rows"])["rows"].to_pylist()
        return sizes

    def rows(self, inventory: Path, part: int, batch_size: int) -> Iterator[Rows]:
        """The rows of a part. Reading parts in ascending order reads each row group only once."""
        if self._parts is None:
            with reading(inventory):
                self._parts = pq.read_table(inventory)
        entry = self._parts.slice(part, 1).to_pylist()[0]
        first_in_file: int = entry["first_in_file"]
        done = 0
        while done < entry["rows"]:
            wanted = min(batch_size, entry["rows"] - done)
            table = self._read(entry["file"], entry["row_group"], entry["first_in_group"] + done, wanted)
            yield self._batch(table, entry["file"], first_in_file + done)
            done += wanted

    def difference(self, inventory: Path) -> str | None:
        """The first file that was added, removed or changed."""
        old: dict[str, tuple[int, int, int]] = {}
        with reading(inventory):
            for part in pq.read_table(inventory).to_pylist():
                rows = old[part["file"]][2] if part["file"] in old else 0
                old[part["file"]] = (part["size"], part["changed_ns"], rows + part["rows"])
        new = {}
        for name in self._names:
            found, rows = (self._folder / name).stat(), self._open(name).metadata.num_rows
            if rows:  # a file without rows has no part in the inventory
                new[name] = (found.st_size, found.st_mtime_ns, rows)
        for name in sorted(old.keys() | new.keys()):
            if name not in new:
                return f"{name} is missing"
            if name not in old:
                return f"{name} was added"
            if old[name] != new[name]:
                return f"{name} was changed"
        return None

    def _open(self, name: str) -> pq.ParquetFile:
        try:
            # Streams pages instead of reading a whole column of a row group, which may be gigabytes.
            file = pq.ParquetFile(self._folder / name, pre_buffer=False, buffer_size=_BUFFER_BYTES)
        except (OSError, pa.ArrowException) as error:
            raise ScoreError(f"{self._folder / name}: this is not a readable Parquet file: {_reason(error)}") from error
        for column, kind in getattr(self, "_types", {}).items():
            schema = file.schema_arrow
            if schema.get_field_index(column) < 0 or schema.field(column).type != kind:
                raise ScoreError(
                    f"{self._folder / name}: column '{column}' must be of type {kind}, as in {self._names[0]}"
                )
        return file

    def _read(self, name: str, row_group: int, first: int, count: int) -> pa.Table:
        """Rows of a row group, from where the last call stopped if possible."""
        at = self._position
        if at is None or (at.file, at.row_group) != (name, row_group) or at.row > first:
            at = self._position = self._start(name, row_group)
        pieces = []
        while count:
            batch = at.rest if at.rest is not None else self._next(at)
            skipped = min(first - at.row, batch.num_rows)
            taken = batch.slice(skipped, count)
            at.row += skipped + taken.num_rows
            rest = batch.slice(skipped + taken.num_rows)
            at.rest = rest if rest.num_rows else None
            first += taken.num_rows
            count -= taken.num_rows
            pieces.append(taken)
        return pa.Table.from_batches(pieces)

    def _start(self, name: str, row_group: int) -> _Position:
        file = self._open(name)
        metadata = file.metadata.row_group(row_group)
        size = max(1, metadata.total_byte_size // max(1, metadata.num_rows))
        batches = file.iter_batches(
            max(1, min(1024, _READ_BYTES // size)), [row_group], columns=list(self._types), use_threads=False
        )
        return _Position(name, row_group, 0, batches)

    def _next(self, at: _Position) -> pa.RecordBatch:
        try:
            return next(at.batches)
        except StopIteration:
            reason = "it ends earlier than its metadata says"
        except (OSError, pa.ArrowException) as error:
            reason = _reason(error)
        raise ScoreError(
            f"{self._folder / at.file}: row group {at.row_group} cannot be read after row {at.row}: {reason}; replace "
            "the file and score it anew, or leave it out"
        )

    def _batch(self, table: pa.Table, file: str, first: int) -> Rows:
        column = table[self._column].combine_chunks()
        if self._key is not None:
            keys = table[self._key].combine_chunks()
        else:
            keys = pa.array([f"{file}:{row}" for row in range(first, first + len(column))], pa.string())
        if self._pixels:
            return Rows(keys, pixels=pixels_of(column))
        return Rows(keys, files=files_of(column))


def parquet_names(folder: Path) -> list[str]:
    """Names of the Parquet files that lie directly in a folder, sorted. `_` and `.` begin names of metadata."""
    return sorted(path.name for path in folder.glob("*.parquet") if not path.name.startswith(("_", ".")))


def _left_out(folder: Path) -> LeftOut:
    """The other files of a folder, without those whose names say that they are metadata."""
    left_out = LeftOut()
    for file in sorted(folder.iterdir()):
        if not file.name.startswith(("_", ".")) and not file.name.endswith(".parquet") and file.is_file():
            left_out.add(shown(file.name))
    return left_out


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())
