"""Image files as input: those of a folder, or those that a list names."""

import os
import stat
from codecs import BOM_UTF8
from collections.abc import Iterator
from itertools import islice, zip_longest
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from cifar_core.files import open_without_waiting
from cifar_core.pixels import EXTENSIONS, ImageRejected
from service.score.errors import ScoreError
from service.score.rows import FileName, Kind, LeftOut, Rows, reading, shown

_INVENTORY = pa.schema([("path", pa.binary()), ("size", pa.int64()), ("changed_ns", pa.int64())])
"""Path as bytes, because names need not be UTF-8; size in bytes and time of the last change, null if unknown."""

Entry = tuple[bytes, int | None, int | None]


class ImageFiles:
    """A folder, or a list of files.

    A folder is searched with its subfolders, in the order of the names, for files with an extension in
    `EXTENSIONS`; links to folders are not followed. A list is a text file with one path per line; a byte order
    mark at its beginning is no part of the first path.

    Args:
        kind: "folder" or "list".
        path: The folder, or the list.
        root: Folder that relative paths start from: the folder itself; for a list, usually the current folder.
    """

    key = pa.field("path", pa.string())

    def __init__(self, kind: Kind, path: Path, root: Path) -> None:
        self._kind, self._path, self._root = kind, path, os.fspath(root)
        self.left_out = LeftOut()

    def write_inventory(self, file: Path, rows_per_part: int) -> None:
        """Writes one row per file; a row group is a part. Only one folder's names are in memory at a time."""
        entries = map(self._entry, self._names())
        empty = True
        with pq.ParquetWriter(file, _INVENTORY) as writer:
            while rows := list(islice(entries, rows_per_part)):
                columns = [
                    pa.array(column, field.type)
                    for column, field in zip(zip(*rows, strict=True), _INVENTORY, strict=True)
                ]
                writer.write_table(pa.Table.from_arrays(columns, schema=_INVENTORY), rows_per_part)
                empty = False
        if empty:
            looked_for = (
                f"no file with an extension {', '.join(EXTENSIONS)}, and no .parquet file directly in it"
                if self._kind == "folder"
                else "no path; write one per line"
            )
            raise ScoreError(f"{self._path}: the {self._kind} holds {looked_for}")

    def part_sizes(self, inventory: Path) -> list[int]:
        """Number of files of each part."""
        with reading(inventory):
            metadata = pq.read_metadata(inventory)
        return [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]

    def rows(self, inventory: Path, part: int, batch_size: int) -> Iterator[Rows]:
        """The files of a part. They are named here and read later, by `read`."""
        with reading(inventory):
            table = pq.ParquetFile(inventory).read_row_group(part)
        for batch in table.to_batches(batch_size):
            paths = [os.fsdecode(path) for path in batch["path"].to_pylist()]
            sizes = [size or 0 for size in batch["size"].to_pylist()]
            files = [
                FileName(os.path.join(self._root, path), size)  # noqa: PTH118 -- Path would change what a list says
                for path, size in zip(paths, sizes, strict=True)
            ]
            yield Rows(pa.array([shown(path) for path in paths], pa.string()), files=files)

    def difference(self, inventory: Path) -> str | None:
        """The first file that was added, removed or changed."""
        names = self._names()
        with reading(inventory):
            count = pq.read_metadata(inventory).num_rows
            for number, (old, new) in enumerate(zip_longest(_entries(inventory), map(self._entry, names))):
                if old == new:
                    continue
                if old and new and old[0] == new[0]:
                    return f"{shown(os.fsdecode(new[0]))} was changed"
                found = number + (new is not None) + sum(1 for _ in names)
                at = [shown(os.fsdecode(entry[0])) if entry else "the end" for entry in (old, new)]
                return f"{found:,} files now, {count:,} then; where {at[0]} was, there is {at[1]} now"
        return None

    def _names(self) -> Iterator[str]:
        """Paths of all files, in their order."""
        self.left_out = LeftOut()
        return self._walk("") if self._kind == "folder" else self._lines()

    def _walk(self, folder: str) -> Iterator[str]:
        """Paths of the image files below a folder, relative to the root."""
        try:
            with os.scandir(os.path.join(self._root, folder)) as found:  # noqa: PTH118
                entries = sorted((entry.name, entry.is_dir(follow_symlinks=False)) for entry in found)
        except OSError as error:
            raise ScoreError(f"{error.filename}: this folder cannot be read ({error.strerror})") from error
        for name, is_folder in entries:
            path = f"{folder}/{name}" if folder else name
            if is_folder:
                yield from self._walk(path)
            elif name.lower().endswith(EXTENSIONS):
                yield path
            else:
                self.left_out.add(shown(path))

    def _lines(self) -> Iterator[str]:
        try:
            with self._path.open("rb") as lines:
                for number, line in enumerate(lines):
                    if path := (line if number else line.removeprefix(BOM_UTF8)).rstrip(b"\r\n"):
                        yield os.fsdecode(path)
        except OSError as error:
            raise ScoreError(f"{self._path}: this list cannot be read ({error.strerror})") from error

    def _entry(self, path: str) -> Entry:
        try:
            found = os.stat(os.path.join(self._root, path))  # noqa: PTH116, PTH118
        except (OSError, ValueError):  # its row will say why
            return os.fsencode(path), None, None
        return os.fsencode(path), found.st_size, found.st_mtime_ns


def read(path: str, max_bytes: int) -> bytes | ImageRejected:
    """The content of an image file, or why it cannot be read. Never waits for a pipe or a device.

    Args:
        path: The file.
        max_bytes: A larger file is rejected without being read.
    """
    try:
        with open(path, "rb", opener=open_without_waiting) as stream:
            found = os.fstat(stream.fileno())
            if not stat.S_ISREG(found.st_mode):
                return ImageRejected("the file cannot be read: it is not a regular file")
            if found.st_size > max_bytes:
                return ImageRejected(
                    f"the image has {found.st_size} bytes; at most {max_bytes} are allowed (--max-image-bytes)"
                )
            # Files of the kernel, such as /proc/kmsg, call themselves regular and empty, but may wait.
            return stream.read(max_bytes + 1) if found.st_size else b""
    except OSError as error:
        return ImageRejected(f"the file cannot be read: {error.strerror}")
    except ValueError as error:
        return ImageRejected(f"the file cannot be read: {error}")


def _entries(inventory: Path) -> Iterator[Entry]:
    for batch in pq.ParquetFile(inventory).iter_batches(4096):
        yield from zip(*(batch[name].to_pylist() for name in _INVENTORY.names), strict=True)
