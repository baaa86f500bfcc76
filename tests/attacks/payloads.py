"""Request bodies, in the wire format of protobuf, that are small to send and expensive to parse, walk or keep."""

import functools
from collections.abc import Callable

from tests.attacks.http2 import CLASSIFY, MODEL_INFER

LARGE = 15_000_000
FULL = 16_000_000  # just below the default limit of a message
LENGTH_DELIMITED = 2


def varint(value: int) -> bytes:
    """Protobuf's encoding of a number that is not negative."""
    parts = bytearray()
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])


def field(number: int, content: bytes) -> bytes:
    """A field of bytes, text or a message."""
    return varint(number << 3 | LENGTH_DELIMITED) + varint(len(content)) + content


def empty_images(count: int) -> bytes:
    """A ClassifyRequest of images without content, two bytes each."""
    return field(2, b"") * count


def empty_open_inference_fields(number: int, count: int) -> bytes:
    """A ModelInferRequest of empty entries in one of its repeated fields."""
    return field(1, b"cifar10") + field(number, b"") * count


def open_inference_input(content: bytes) -> bytes:
    """A ModelInferRequest with one input, some of whose fields are `content`."""
    return field(1, b"cifar10") + field(5, field(1, b"images") + field(2, b"UINT8") + content)


def open_inference_request(content: bytes) -> bytes:
    """A ModelInferRequest that is correct but for further fields, `content`."""
    tensor = field(1, b"images") + field(2, b"UINT8") + field(3, bytes([1, 32, 32, 3]))
    return field(1, b"cifar10") + content + field(5, tensor) + field(7, bytes(3072))


def parameters(count: int) -> bytes:
    """Entries of a map of parameters, each with a key of its own."""
    return b"".join(field(4, field(1, b"%d" % number) + field(2, b"\x10\x01")) for number in range(count))


BODIES: dict[str, tuple[str, Callable[[], bytes]]] = {
    "8,000,000 empty images": (CLASSIFY, lambda: empty_images(FULL // 2)),
    "2,000,000 empty images": (CLASSIFY, lambda: empty_images(2_000_000)),
    "8,000,000 unknown fields": (CLASSIFY, lambda: b"\x78\x01" * (FULL // 2)),
    # Field 15 begins a group, which holds a group, and so on.
    "groups nested 16,000,000 deep": (CLASSIFY, lambda: b"\x7b" * FULL),
    "request_id of 15 MB": (CLASSIFY, lambda: field(1, b"i" * LARGE) + field(3, bytes(3072))),
    "request_id that is no UTF-8": (CLASSIFY, lambda: field(1, b"\xff" * LARGE)),
    "5,000,000 times top_k": (CLASSIFY, lambda: b"\x20\x01" * 5_000_000),
    "8,000,000 empty inputs": (MODEL_INFER, lambda: empty_open_inference_fields(5, FULL // 2)),
    "8,000,000 empty outputs": (MODEL_INFER, lambda: empty_open_inference_fields(6, FULL // 2)),
    "8,000,000 empty raw contents": (MODEL_INFER, lambda: empty_open_inference_fields(7, FULL // 2)),
    "8,000,000 empty parameters": (MODEL_INFER, lambda: empty_open_inference_fields(4, FULL // 2)),
    "700,000 parameters": (MODEL_INFER, lambda: open_inference_request(parameters(700_000))),
    "15,000,000 dimensions": (MODEL_INFER, lambda: open_inference_input(field(3, bytes(LARGE)))),
    "15,000,000 numbers": (MODEL_INFER, lambda: open_inference_input(field(5, field(4, bytes(LARGE))))),
    "7,500,000 empty elements": (MODEL_INFER, lambda: open_inference_input(field(5, field(8, b"") * (LARGE // 2)))),
    "id of 15 MB": (MODEL_INFER, lambda: open_inference_request(field(3, b"i" * LARGE))),
    "model name of 15 MB": (MODEL_INFER, lambda: field(1, b"n" * LARGE)),
    "parameter of 15 MB": (
        MODEL_INFER,
        lambda: open_inference_request(field(4, field(1, b"key") + field(2, field(3, b"p" * LARGE)))),
    ),
}


@functools.cache
def body(name: str) -> tuple[str, bytes]:
    """Method and request of a key of `BODIES`; made once."""
    method, make = BODIES[name]
    return method, make()
