"""Changes that keep the structure of a file: parts are repeated, removed or changed, and checksums are corrected."""

import random
import struct
import zlib
from collections.abc import Callable

_INTERESTING = (0, 1, 2, 3, 7, 8, 15, 16, 31, 32, 64, 127, 128, 255, 256, 1023, 4096, 32767, 65535, 65536, 2**31 - 1)
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Kinds of chunks that Pillow treats in a way of its own.
_PNG_KINDS = (
    b"IDAT", b"PLTE", b"tRNS", b"gAMA", b"cHRM", b"sRGB", b"pHYs", b"tEXt", b"zTXt", b"iTXt", b"eXIf", b"iCCP", b"acTL",
    b"fcTL", b"fdAT", b"IEND",
)  # fmt: skip

Part = tuple[bytes, bytes]
"""Kind and content of a chunk or segment."""
Mutate = Callable[[bytes], bytes]


def mutate(data: bytes, seeds: list[bytes], generator: random.Random, mutate_bytes: Mutate) -> bytes:
    """A changed input.

    Args:
        data: The input.
        seeds: Other inputs, of which parts may be taken.
        generator: Decides.
        mutate_bytes: Changes bytes of which nothing is known.
    """
    split, join = _structure(data)
    if split is None or join is None or generator.random() < 0.3:
        return _with_number(data, generator) if generator.random() < 0.3 else mutate_bytes(data)
    parts = split(data)
    if not parts:
        return mutate_bytes(data)
    for _ in range(generator.choice((1, 1, 2, 4))):
        parts = _change(parts, split, seeds, generator, mutate_bytes)
    return join(parts)


def _change(
    parts: list[Part],
    split: Callable[[bytes], list[Part]],
    seeds: list[bytes],
    generator: random.Random,
    mutate_bytes: Mutate,
) -> list[Part]:
    """One change of the list of parts."""
    place = generator.randrange(len(parts)) if parts else 0
    action = generator.choice(("repeat", "remove", "exchange", "take", "kind", "number", "bytes", "bytes", "inflated"))
    if not parts or action == "take":
        other = split(generator.choice(seeds)) or [(b"IDAT", b"")]
        return [*parts[:place], generator.choice(other), *parts[place:]]
    kind, content = parts[place]
    if action == "repeat":
        return [*parts[:place], *[parts[place]] * generator.choice((1, 2, 10, 300)), *parts[place:]]
    if action == "remove":
        return parts[:place] + parts[place + 1 :]
    if action == "exchange":
        other_place = generator.randrange(len(parts))
        parts[place], parts[other_place] = parts[other_place], parts[place]
        return parts
    if action == "kind":
        kind = generator.choice(_PNG_KINDS) if len(kind) == 4 else mutate_bytes(kind)[: len(kind)].ljust(len(kind))
    elif action == "number":
        content = _with_number(content, generator)
    elif action == "inflated":
        content = _mutate_inflated(content, mutate_bytes)
    else:
        content = mutate_bytes(content)
    return [*parts[:place], (kind, content), *parts[place + 1 :]]


def _with_number(data: bytes, generator: random.Random) -> bytes:
    """Writes a number that is often a limit over some bytes."""
    form = generator.choice(("B", ">H", "<H", ">I", "<I"))
    size = struct.calcsize(form)
    if len(data) < size:
        return data
    # Headers are at the beginning.
    place = min(int(generator.random() ** 3 * len(data)), len(data) - size)
    value = generator.choice(_INTERESTING) % 2 ** (8 * size)
    return data[:place] + struct.pack(form, value) + data[place + size :]


def _mutate_inflated(content: bytes, mutate_bytes: Mutate) -> bytes:
    """Changes what is compressed, so that the result can be inflated."""
    try:
        inflated = zlib.decompressobj().decompress(content, 2**18)
    except zlib.error:
        return mutate_bytes(content)
    return zlib.compress(mutate_bytes(inflated), 1)


def _structure(
    data: bytes,
) -> tuple[Callable[[bytes], list[Part]] | None, Callable[[list[Part]], bytes] | None]:
    if data.startswith(_PNG_SIGNATURE):
        return _split_png, _join_png
    if data.startswith(b"\xff\xd8"):
        return _split_jpeg, _join_jpeg
    if data.startswith(b"RIFF"):
        return _split_webp, _join_webp
    return None, None


def _split_png(data: bytes) -> list[Part]:
    parts, place = [], len(_PNG_SIGNATURE)
    while place + 8 <= len(data):
        size = int.from_bytes(data[place : place + 4], "big")
        parts.append((data[place + 4 : place + 8], data[place + 8 : place + 8 + size]))
        place += 12 + size
    return parts


def _join_png(parts: list[Part]) -> bytes:
    return _PNG_SIGNATURE + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in parts
    )


def _split_jpeg(data: bytes) -> list[Part]:
    """Segments; that of a scan holds the compressed data up to the next marker as well."""
    parts, place = [], 2
    while place + 4 <= len(data) and data[place] == 0xFF:
        end = place + 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        if data[place + 1] == 0xDA:
            while end + 1 < len(data) and (data[end] != 0xFF or data[end + 1] in (0, *range(0xD0, 0xD8))):
                end += 1
        parts.append((data[place : place + 2], data[place + 4 : end]))
        place = end
    return parts


def _join_jpeg(parts: list[Part]) -> bytes:
    """The length of a scan's header follows from its number of components; that of others is their size."""
    segments = []
    for kind, content in parts:
        header = 6 + 2 * content[0] if kind == b"\xff\xda" and content else 2 + len(content)
        segments.append(kind + struct.pack(">H", header % 65536) + content)
    return b"\xff\xd8" + b"".join(segments) + b"\xff\xd9"


def _split_webp(data: bytes) -> list[Part]:
    parts, place = [], 12
    while place + 8 <= len(data):
        size = int.from_bytes(data[place + 4 : place + 8], "little")
        parts.append((data[place : place + 4], data[place + 8 : place + 8 + size]))
        place += 8 + size + size % 2
    return parts


def _join_webp(parts: list[Part]) -> bytes:
    body = b"WEBP" + b"".join(
        kind + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2) for kind, content in parts
    )
    return b"RIFF" + struct.pack("<I", len(body)) + body
