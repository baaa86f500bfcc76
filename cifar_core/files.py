"""Writing files so that a reader never sees a part of one, and reading without waiting for ever.

Imports only the base error of the project.
"""

import contextlib
import errno
import json
import os
import stat
from pathlib import Path

from cifar_core.errors import CifarError


class FileWriteError(CifarError):
    """A file cannot be written. Its previous content is unchanged."""


def atomic_write(path: Path, content: bytes) -> None:
    """Replaces a file as a whole: after a kill or a failed write it holds the old or the new content, never a part.

    Raises:
        FileWriteError: The file cannot be written, for example because the disk is full.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)  # without this a power cut may undo the rename
        finally:
            os.close(directory)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        before = "the existing file is unchanged" if path.exists() else "the file did not exist before"
        raise FileWriteError(
            f"{path}: {len(content):,} bytes cannot be written ({error.strerror}); {before}; "
            "free some space or permit writing, then run the command again"
        ) from error


def read_regular(path: Path) -> bytes:
    """The content of a regular file. To open a named pipe, or to read a device, may take for ever.

    Raises:
        OSError: It cannot be read, or it is no regular file.
    """
    with open(path, "rb", opener=open_without_waiting) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file", str(path))
        return file.read()


def open_without_waiting(path: str, flags: int) -> int:
    """An opener for `open`. Opens a named pipe, too, without waiting for its other end."""
    return os.open(path, flags | os.O_NONBLOCK)


def to_json(value: object) -> bytes:
    """JSON as this project writes it: indented by two, keys in the order given, a newline at the end."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
