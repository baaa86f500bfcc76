"""Writing files so that a reader never sees a part of one, reading without waiting for ever, and paths from options.

Imports only the base error of the project.
"""

import argparse
import contextlib
import errno
import json
import lzma
import os
import stat
import struct
import tempfile
import zipfile
import zlib
from pathlib import Path

from cifar_core.errors import CifarError

ARCHIVE_ERRORS = (
    OSError,
    RuntimeError,  # encrypted, or with a method that is not supported
    ValueError,
    KeyError,
    EOFError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
)
"""What may be raised for a damaged zip archive, the format of NumPy's and torch's files."""


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
        sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        before = "the existing file is unchanged" if path.exists() else "the file did not exist before"
        raise FileWriteError(
            f"{path}: {len(content):,} bytes cannot be written ({error.strerror}); {before}; "
            "free some space or permit writing, then run the command again"
        ) from error


def sync_folder(folder: Path) -> None:
    """Waits until the names in a folder are on the disk. Without this a power cut may undo a rename.

    Raises:
        OSError: The folder cannot be opened, or the disk fails.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_output(path: Path) -> None:
    """Checks, before a long computation, that `write_output` can write its result. Creates the folders of the path.

    Raises:
        FileWriteError: It is a folder or a disk, or it cannot be written.
        OSError: A folder of the path cannot be created.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, file = _descriptor(path), Path(os.path.realpath(path))
    try:
        if descriptor is not None:
            os.write(descriptor, b"")  # fails if it is closed, or open for reading only
        elif not _is_stream(path):
            _check_file(file)
    except OSError as error:
        raise FileWriteError(f"{path} cannot be written ({error.strerror}); name another file") from error


def _check_file(file: Path) -> None:
    if file.exists():
        if not file.is_file():
            raise OSError(errno.EINVAL, "it is a folder" if file.is_dir() else "it is no regular file")
        if not os.access(file, os.W_OK):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
    # The name is new, and eight characters longer than the prefix, as is the one under which `atomic_write` begins.
    with tempfile.NamedTemporaryFile(prefix=f".{file.name}", dir=file.parent):
        pass


def write_output(path: Path, content: bytes) -> None:
    """Writes a result to the file that a user named.

    A link is followed, so it stays a link. A pipe, a terminal or /dev/stdout cannot be replaced by a rename, as other
    files are: the content is written into it.

    Raises:
        FileWriteError: It cannot be written. The content of a regular file is unchanged.
    """
    descriptor = _descriptor(path)
    if descriptor is None and not _is_stream(path):
        atomic_write(Path(os.path.realpath(path)), content)
        return
    try:
        # A descriptor is copied and not opened by its path, which would overwrite the start of the file behind it.
        with path.open("wb") if descriptor is None else os.fdopen(os.dup(descriptor), "wb") as stream:
            stream.write(content)
    except OSError as error:
        raise FileWriteError(f"{path} cannot be written ({error.strerror}); name another file") from error


def _descriptor(path: Path) -> int | None:
    """The open file of this process that a path such as /dev/stdout or /dev/fd/3 stands for; None for other paths."""
    for _ in range(_MOST_LINKS):
        if path.parent in _DESCRIPTORS and path.name.isdecimal() and len(path.name) < _DIGITS:
            return int(path.name)
        try:
            path = path.parent / path.readlink()
        except OSError:
            return None
    return None


def _is_stream(path: Path) -> bool:
    """Whether a path leads to a pipe or a device such as a terminal, but not to a disk."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)


_DESCRIPTORS = (Path("/dev/fd"), Path("/proc/self/fd"))
_DIGITS = 10
"""Numbers of descriptors are shorter."""
_MOST_LINKS = 40
"""Number of links that Linux follows in a path."""


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


def not_empty(text: str) -> str:
    """The value of an option for `argparse` that must not be empty: a shell gives "" for a variable that is not set.

    Raises:
        argparse.ArgumentTypeError: It is empty.
    """
    if not text:
        raise argparse.ArgumentTypeError("it is empty; leave the option out, or name a file or folder")
    return text


def path_option(text: str) -> Path:
    """The value of an option for `argparse` that is a path. An empty one would mean the current folder.

    Raises:
        argparse.ArgumentTypeError: It is empty.
    """
    return Path(not_empty(text))
