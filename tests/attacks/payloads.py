"""Request bodies, in the wire format of protobuf, that are small to send and expensive to parse, walk or keep."""

import functools
from collections.abc import Callable

from tests.attacks.http2 import CLASSIFY, MODEL_INFER

# Just below the largest message of the server's default options, now and in the commits before.
LIMIT = 8_000_000
OLD_LIMIT = 16_000_000
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


def empty_open_inference_fields(number: int, size: int) -> bytes:
    """A ModelInferRequest of empty entries, two bytes each, in one of its repeated fields."""
    return field(1, b"cifar10") + field(number, b"") * (size // 2)


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


# Method, and the request of about so many bytes.
BODIES: dict[str, tuple[str, Callable[[int], bytes]]] = {
    "empty images": (CLASSIFY, lambda size: field(2, b"") * (size // 2)),
    "images of one byte": (CLASSIFY, lambda size: field(2, field(1, b"x")) * (size // 5)),
    "unknown fields": (CLASSIFY, lambda size: b"\x78\x01" * (size // 2)),
    # Field 15 begins a group, which holds a group, and so on.
    "nested groups": (CLASSIFY, lambda size: b"\x7b" * size),
    "a long request_id": (CLASSIFY, lambda size: field(1, b"i" * size) + field(3, bytes(3072))),
    "a long request_id that is no UTF-8": (CLASSIFY, lambda size: field(1, b"\xff" * size)),
    "many times top_k": (CLASSIFY, lambda size: b"\x20\x01" * (size // 2)),
    "many times request_id": (CLASSIFY, lambda size: field(1, b"") * (size // 2)),
    "empty inputs": (MODEL_INFER, lambda size: empty_open_inference_fields(5, size)),
    "empty outputs": (MODEL_INFER, lambda size: empty_open_inference_fields(6, size)),
    "empty raw contents": (MODEL_INFER, lambda size: empty_open_inference_fields(7, size)),
    "empty parameters": (MODEL_INFER, lambda size: empty_open_inference_fields(4, size)),
    "many parameters": (MODEL_INFER, lambda size: open_inference_request(parameters(size // 16))),
    "many dimensions": (MODEL_INFER, lambda size: open_inference_input(field(3, bytes(size)))),
    "many numbers": (MODEL_INFER, lambda size: open_inference_input(field(5, field(4, bytes(size))))),
    "empty elements": (MODEL_INFER, lambda size: open_inference_input(field(5, field(8, b"") * (size // 2)))),
    "a long id": (MODEL_INFER, lambda size: open_inference_request(field(3, b"i" * size))),
    "a long model name": (MODEL_INFER, lambda size: field(1, b"n" * size)),
    "a long parameter": (
        MODEL_INFER,
        lambda size: open_inference_request(field(4, field(1, b"key") + field(2, field(3, b"p" * size)))),
    ),
}
# What an honest request may hold too, though not so much of it: such a request need not be refused.
MAY_BE_ANSWERED = ("unknown fields", "many times top_k", "many times request_id")
LONG_TEXTS = ("a long request_id", "a long id", "a long parameter")


@functools.cache
def body(name: str, size: int = LIMIT) -> tuple[str, bytes]:
    """Method and request of a key of `BODIES`, about so many bytes; made once."""
    method, make = BODIES[name]
    return method, make(size)
