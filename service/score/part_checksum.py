"""A checksum of all bytes of a Parquet file, inside the file: SHA-256, in the 32 bytes in front of the footer.

    PAR1, column chunks | SHA-256 of all other bytes | footer, length of the footer (4 bytes), PAR1

Parquet's own checksums do not cover the footer, and reading a damaged footer can end the process. Readers find the
column chunks by the offsets in the footer and the footer by its length, so they do not see the bytes between the two.
A checksum in a file of its own could be written without its part, or be lost when parts are copied.
"""

import hashlib
import os
from typing import BinaryIO

_MAGIC = b"PAR1"
_LENGTH_BYTES = 4
_TAIL_BYTES = _LENGTH_BYTES + len(_MAGIC)
_DIGEST_BYTES = 32
_BLOCK_BYTES = 2**20


def with_checksum(content: bytes) -> bytes:
    """The content of a Parquet file, with the checksum."""
    footer = len(content) - _TAIL_BYTES - _footer_bytes(content[-_TAIL_BYTES:])
    return b"".join((content[:footer], hashlib.sha256(content).digest(), content[footer:]))


def is_whole(stream: BinaryIO) -> bool:
    """Whether a file is a Parquet file with a checksum, and no byte of it has changed. Reads all of it.

    Raises:
        OSError: The file cannot be read.
    """
    size = stream.seek(0, os.SEEK_END)
    stream.seek(max(0, size - _TAIL_BYTES))
    tail = stream.read(_TAIL_BYTES)
    before = size - _TAIL_BYTES - _footer_bytes(tail) - _DIGEST_BYTES
    if not tail.endswith(_MAGIC) or before < 0:
        return False
    stream.seek(0)
    digest = hashlib.sha256()
    _update(digest, stream, before)
    expected = stream.read(_DIGEST_BYTES)
    _update(digest, stream, size - before - _DIGEST_BYTES)
    return digest.digest() == expected


def _footer_bytes(tail: bytes) -> int:
    return int.from_bytes(tail[:_LENGTH_BYTES], "little")


def _update(digest: "hashlib._Hash", stream: BinaryIO, count: int) -> None:
    while count and (block := stream.read(min(count, _BLOCK_BYTES))):
        digest.update(block)
        count -= len(block)
