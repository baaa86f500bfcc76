"""What the server and its decode processes send each other.

For each file the server sends a `REQUEST` header (size of the file and memory for decoding it, both in bytes) and the
file. For each file, in order, the process sends a `REPLY` header (kind, size of the content) and the content: pixels or
a message.
"""

import enum
import struct
from dataclasses import dataclass

from cifar_core.pixels import IMAGE_BYTES

REQUEST = struct.Struct("<IQ")
REPLY = struct.Struct("<BI")
NEEDED = struct.Struct("<Q")
MAX_REPLY_BYTES = max(IMAGE_BYTES, 4000)


class Kind(enum.IntEnum):
    """What a reply holds."""

    READY = 0  # no content: the process has started
    PIXELS = 1  # 3,072 bytes
    REJECTED = 2  # message for the sender of the image
    FAULT = 3  # traceback for the log
    LARGE = 4  # `NEEDED`: the image needs more memory, or has more pixels, than allowed here; it was not decoded


SIZES = {
    Kind.READY: range(1),
    Kind.PIXELS: range(IMAGE_BYTES, IMAGE_BYTES + 1),
    Kind.REJECTED: range(MAX_REPLY_BYTES + 1),
    Kind.FAULT: range(MAX_REPLY_BYTES + 1),
    Kind.LARGE: range(NEEDED.size, NEEDED.size + 1),
}
"""By kind, the sizes that a reply may have, in bytes."""


@dataclass(frozen=True)
class ProcessLimits:
    """Limits of a process for one file.

    Attributes:
        cpu_seconds: Seconds of CPU time, after which the kernel ends the process with SIGPROF.
        max_pixels: Largest number of pixels. The reply to a larger image is `LARGE`.
        max_memory: Largest memory in bytes. An image that needs more is rejected.
        niceness: Number that is added to the niceness of the server.
    """

    cpu_seconds: float
    max_pixels: int
    max_memory: int
    niceness: int
