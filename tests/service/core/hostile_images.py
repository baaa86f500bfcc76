"""Generated files that are far more expensive to decode than their size suggests."""

import struct
import zlib

import numpy as np
from PIL import Image

from tests.cifar_core.image_corpus import gradient, saved


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int, colour_type: int, rows: bytes, extra: bytes = b"", interlace: int = 0):
    """A PNG file; `rows` are the unfiltered rows, each after a filter byte, and `extra` comes before them."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, interlace)
    body = png_chunk(b"IHDR", header) + extra + png_chunk(b"IDAT", zlib.compress(rows, 1)) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def with_scans(file: bytes, scans: int) -> bytes:
    """A progressive JPEG whose last scan is repeated until it has this many."""
    end = file.rindex(b"\xff\xd9")
    last = file.rindex(b"\xff\xda")
    return file[:end] + file[last:end] * (scans - file.count(b"\xff\xda")) + file[end:]


def progressive_jpeg(side: int, scans: int) -> bytes:
    return with_scans(saved(Image.new("L", (side, side), 90), "JPEG", progressive=True), scans)


def run_length_bmp(width: int) -> bytes:
    """One row of BMP, run-length encoded."""
    pixels = b"\xff\x00" * 2 + b"\x00\x01"
    header = struct.pack("<IiiHHIIiiII", 40, width, 1, 1, 8, 1, len(pixels), 0, 0, 256, 0) + bytes(1024)
    return b"BM" + struct.pack("<IHHI", 14 + len(header) + len(pixels), 0, 0, 14 + len(header)) + header + pixels


def bmp(width: int, height: int, bits: int, compression: int = 0, masks: bytes = b"", rows: bytes = b"") -> bytes:
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, 0, 0, 0, 0, 0) + masks
    return b"BM" + struct.pack("<IHHI", 14 + len(header) + len(rows), 0, 0, 14 + len(header)) + header + rows


def png_16_bit(side: int) -> bytes:
    return png(side, side, 16, 0, bytes((1 + 2 * side) * side))


def png_of_many_chunks(kind: bytes, count: int, data: bytes = b"") -> bytes:
    return png(32, 32, 8, 2, bytes(97 * 32), png_chunk(kind, data) * count)


def png_with_inflating_text(count: int) -> bytes:
    text = zlib.compress(bytes(2**20))
    return png(32, 32, 8, 2, bytes(97 * 32), b"".join(png_chunk(b"zTXt", b"k%d\0\0" % i + text) for i in range(count)))


def png_with_inflating_profile(size: int) -> bytes:
    return png(32, 32, 8, 2, bytes(97 * 32), png_chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(size))))


def apng_of_many_frames(count: int) -> bytes:
    """Frames of one pixel after the first."""
    control = b"".join(
        png_chunk(b"fcTL", struct.pack(">IIIIIHHBB", 1 + 2 * i, 1, 1, 0, 0, 1, 10, 0, 0))
        + png_chunk(b"fdAT", struct.pack(">I", 2 + 2 * i) + zlib.compress(bytes(4)))
        for i in range(count)
    )
    first = png_chunk(b"acTL", struct.pack(">II", count + 1, 0))
    first += png_chunk(b"fcTL", struct.pack(">IIIIIHHBB", 0, 32, 32, 0, 0, 1, 10, 0, 0))
    file = png(32, 32, 8, 2, bytes(97 * 32), first)
    end = len(file) - 12
    return file[:end] + control + file[end:]


def gif_of_many_comments(count: int) -> bytes:
    file = saved(gradient(32, 32).quantize(4), "GIF")
    first_picture = file.index(b"\x2c", 13 + 3 * 2 ** ((file[10] & 7) + 1))
    return file[:first_picture] + b"!\xfe\x01x\x00" * count + file[first_picture:]


def gif_of_large_frame(width: int, height: int) -> bytes:
    """A canvas of one pixel, and a first frame that extends it and is to be disposed of."""
    control = b"!\xf9\x04" + bytes([2 << 2, 0, 0, 0, 0])
    return (
        b"GIF89a" + struct.pack("<HH", 1, 1) + bytes(8) + control + b"," + struct.pack("<HHHHB", 0, 0, width, height, 0)
    )


def jpeg_of_many_segments(marker: int, count: int, data: bytes = b"") -> bytes:
    file = saved(gradient(32, 32), "JPEG")
    segment = bytes((0xFF, marker)) + struct.pack(">H", 2 + len(data)) + data
    return file[:2] + segment * count + file[2:]


def jpeg_with_overlapping_exif(entries: int = 5000) -> bytes:
    """Exif data whose entries all refer to the same bytes, nearly all of it."""
    size = 65_000
    table = b"".join(struct.pack("<HHII", tag, 7, size - 8, 8) for tag in range(1, entries + 1))
    exif = b"II*\0" + struct.pack("<IH", 8, entries) + table + bytes(4)
    return jpeg_of_many_segments(0xE1, 1, b"Exif\0\0" + exif.ljust(size, b"\0"))


def webp_of_large_canvas(side: int) -> bytes:
    """An extended header that claims a canvas, and a picture of 32 pixels."""
    picture = saved(gradient(32, 32), "WEBP")[12:]
    header = b"VP8X" + struct.pack("<II", 10, 0) + (side - 1).to_bytes(3, "little") * 2
    body = b"WEBP" + header + picture
    return b"RIFF" + struct.pack("<I", len(body)) + body


def webp_of_many_chunks(count: int) -> bytes:
    picture = saved(gradient(32, 32), "WEBP")[12:]
    header = b"VP8X" + struct.pack("<II", 10, 0) + (31).to_bytes(3, "little") * 2
    body = b"WEBP" + header + b"junk\0\0\0\0" * count + picture
    return b"RIFF" + struct.pack("<I", len(body)) + body


def noise_png(side: int, mode: str = "RGB") -> bytes:
    """A PNG that is as slow to decode as an ordinary PNG of this many pixels can be."""
    pixels = np.random.default_rng(0).integers(0, 255, (side, side, len(mode)), np.uint8)
    return saved(Image.fromarray(pixels), compress_level=1)


def noise_jpeg(side: int, scans: int) -> bytes:
    """A progressive JPEG whose last scan holds much data and is repeated."""
    pixels = np.random.default_rng(0).integers(0, 255, (side, side), np.uint8)
    return with_scans(saved(Image.fromarray(pixels), "JPEG", quality=20, progressive=True), scans)
