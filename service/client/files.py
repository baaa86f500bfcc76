"""Finds the image files that a user names on the command line, and reads them within the server's limit.

A name is a file, a folder, or a pattern such as "pictures/**/*.jpg". Folders are searched recursively for files with
the suffix of an image format. Whatever is wrong with one name or file is a problem of that one alone.
"""

import glob
import os
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cifar_core.files import open_without_waiting
from cifar_core.pixels import EXTENSIONS

# The part `**` of a pattern, which stands for a folder and all folders below it.
_ANY_FOLDERS = re.compile(r"(?<![^/])\*\*(?![^/])")


@dataclass(frozen=True)
class Found:
    """A file to classify.

    Attributes:
        path: Path of the file; if nothing was found, the name that the user gave.
        label: Short form of the path for a table.
        problem: Why there is no file to classify; None if there is one.
    """

    path: Path
    label: str
    problem: str | None = None


class Selection:
    """The files that names on the command line stand for, in a fixed order. Each iteration searches again.

    The memory that it takes does not depend on the number of files below a folder, only on the largest single folder
    and on the number of matches of a pattern.

    Args:
        names: Files, folders and patterns.

    Attributes:
        ignored: Number of files in folders that the last iteration left out, because of their suffix.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names = tuple(names)
        self.ignored = 0

    def __iter__(self) -> Iterator[Found]:
        self.ignored = 0
        for name in self._names:
            if os.path.isdir(name):  # noqa: PTH112 -- Path.is_dir raises an error if a parent folder is closed
                yield from self._in_folder(name)
            elif os.path.lexists(name) or not glob.has_magic(name):
                yield Found(Path(name), Path(name).name)
            else:
                yield from _matches(name)

    def _in_folder(self, folder: str) -> Iterator[Found]:
        problems: list[OSError] = []
        empty = True
        for parent, folders, files in os.walk(folder, onerror=problems.append):
            folders.sort()  # os.walk visits the folders in this order
            for file in sorted(files):
                path = Path(parent, file)
                if path.suffix.lower() not in EXTENSIONS:
                    self.ignored += 1
                    continue
                empty = False
                yield Found(path, str(path.relative_to(folder)))
            while problems:
                empty = False
                yield _unreadable(problems.pop(0), folder)
        for problem in problems:
            empty = False
            yield _unreadable(problem, folder)
        if empty:
            yield Found(Path(folder), folder, "the folder holds no file with the suffix of an image")


def _unreadable(problem: OSError, folder: str) -> Found:
    path = problem.filename or folder
    return Found(Path(path), path, f"the folder cannot be read: {problem.strerror}")


def _matches(pattern: str) -> Iterator[Found]:
    paths = [path for path in sorted(set(_expanded(pattern))) if not os.path.isdir(path)]  # noqa: PTH112
    for path in paths:
        yield Found(Path(path), path)
    if not paths:
        yield Found(Path(pattern), pattern, "no file matches this pattern")


def _expanded(pattern: str) -> Iterator[str]:
    """The paths that match; some may come twice.

    glob's own `**` follows links to folders, so it would find files many times, or never end.
    """
    any_folders = _ANY_FOLDERS.search(pattern)
    if any_folders is None:
        yield from glob.iglob(pattern)  # noqa: PTH207 -- pathlib's patterns must be relative
        return
    start, end = pattern[: any_folders.start()], pattern[any_folders.end() :]
    rest = end.lstrip("/") if end else "*"
    for top in glob.iglob(start) if start else [""]:  # noqa: PTH207
        for parent, folders, _ in os.walk(top or os.curdir):
            folders[:] = [folder for folder in folders if not folder.startswith(".")]
            below = os.path.join(parent, "")  # noqa: PTH118 -- Path would drop the slash
            yield from _expanded(glob.escape(below if top else below.removeprefix("./")) + rest)


def read_image(path: Path, limit: int) -> bytes:
    """The content of a file. Never waits for a pipe or a device.

    Args:
        path: Path of a regular file.
        limit: Largest allowed number of bytes; a larger file is not read.

    Raises:
        OSError: The file cannot be read, is not a regular file, or is too large. `strerror` is the reason.
    """
    # Looked at before it is opened: opening a pipe waits for the process at its other end.
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise OSError(0, "it is not a regular file", str(path))
    if not found.st_size:  # files of the kernel, such as /proc/kmsg, call themselves regular and empty, but may wait
        return b""
    with open(path, "rb", opener=open_without_waiting) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):  # replaced since
            raise OSError(0, "it is not a regular file", str(path))
        content = file.read(limit + 1)
    if len(content) > limit:
        size = path.stat().st_size
        raise OSError(
            0, f"the file has {size:,} bytes; the server accepts images of at most {limit:,} bytes", str(path)
        )
    return content
