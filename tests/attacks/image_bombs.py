"""Image files of few bytes that take long, or much memory, to decode; each as the bytes of a file."""

import functools
import io
import struct
import zlib

from PIL import Image

SIDE = 5600  # 31,360,000 pixels, just below the default limit


@functools.cache
def progressive_jpeg(scans: int = 2000, side: int = SIDE) -> bytes:
    """A grey progressive JPEG whose last scan is repeated: each repetition decodes every block again."""
    stream = io.BytesIO()
    Image.new("L", (side, side), 128).save(stream, "JPEG", progressive=True)
    file = stream.getvalue()
    start = file.rindex(b"\xff\xda")  # start of a scan
    return file[:start] + file[start:-2] * scans + file[-2:]


def run_length_bmp(width: int = 32_000_000, compression: int = 1) -> bytes:
    """A BMP of 1,084 bytes with one row, which Pillow fills byte by byte in Python."""
    data = b"\x01\x00\x00\x00\x00\x01"  # a run of one pixel, end of the line, end of the bitmap
    palette = bytes(1024)
    header = struct.pack("<IiiHHIIiiII", 40, width, 1, 1, 8, compression, len(data), 0, 0, 256, 0)
    offset = 14 + len(header) + len(palette)
    return struct.pack("<2sIHHI", b"BM", offset + len(data), 0, 0, offset) + header + palette + data


@functools.cache
def png(side: int = SIDE, bits: int = 16, colour: int = 0, interlaced: bool = False) -> bytes:
    """A black PNG; colour 0 is grey, 2 RGB, 6 RGBA, as in the format. Interlaced ones have one row per pass too few."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour]
    packer = zlib.compressobj(9)
    row = bytes(1 + side * channels * bits // 8)
    packed = b"".join([*(packer.compress(row) for _ in range(side)), packer.flush()])
    header = struct.pack(">IIBBBBB", side, side, bits, colour, 0, 0, int(interlaced))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def png_of_chunks(count: int = 500_000) -> bytes:
    """A small PNG with very many empty ancillary chunks before its data."""
    stream = io.BytesIO()
    Image.new("RGB", (32, 32)).save(stream, "PNG")
    file = stream.getvalue()
    empty = struct.pack(">I", 0) + b"prVt" + struct.pack(">I", zlib.crc32(b"prVt"))
    return file[:33] + empty * count + file[33:]


@functools.cache
def gif(side: int = SIDE) -> bytes:
    """A GIF of one colour with as many pixels as are allowed."""
    stream = io.BytesIO()
    Image.new("P", (side, side)).save(stream, "GIF")
    return stream.getvalue()


@functools.cache
def webp(side: int = SIDE) -> bytes:
    """A lossless WebP of one colour with as many pixels as are allowed."""
    stream = io.BytesIO()
    Image.new("RGBA", (side, side)).save(stream, "WEBP", lossless=True)
    return stream.getvalue()


def honest_png() -> bytes:
    """What honest clients send: 64 x 48 pixels of a gradient."""
    image = Image.linear_gradient("L").resize((64, 48)).convert("RGB")
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()
