"""Writing files so that a reader never sees half of one. Imports nothing of the project but the base error."""

import json
import os
from pathlib import Path

from cifar_core.errors import CifarError


class FileWriteError(CifarError):
    """A file that cannot be written. What was there before is unchanged."""


def atomic_write(path: Path, content: bytes) -> None:
    """Replaces a file as a whole: after a kill or a failed write it holds the old content or the new, never a part.

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
        partial.unlink(missing_ok=True)
        before = "the file that was there is unchanged" if path.exists() else "there was no such file before"
        raise FileWriteError(
            f"{path}: cannot write {len(content):,} bytes: {error.strerror}; {before}; "
            "free some space or permit writing, then run the command again"
        ) from error


def to_json(value: object) -> bytes:
    """JSON as this project writes it: indented by two, keys in the order given, a newline at the end."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
