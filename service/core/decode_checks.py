"""Refuses image files that would cost far more than their size suggests, and estimates the memory that decoding needs.

The checks run in the decode process, because the files come from outside, and before any pixel is decoded. The limits
on CPU time and memory that the kernel enforces cover costs that these checks do not recognise.
"""

import math
import struct
from dataclasses import dataclass

from PIL import Image, JpegImagePlugin

from cifar_core.jpeg import SCAN, read_jpeg_header
from cifar_core.pixels import ImageLimits, ImageRejected, check_size

MAX_DIMENSION = 65_535
"""Largest width or height in pixels, as in JPEG. Pillow needs memory for each row, however short it is."""
MAX_SCANS = 64
"""Largest number of scans in a JPEG file. Encoders write about 10; libjpeg reads the whole image for each."""
MAX_JPEG_SEGMENTS = 1_000
"""Largest number of marker segments before the first scan. A large colour profile takes up to 255."""
MAX_PNG_CHUNKS = 16_384
MAX_PNG_METADATA_CHUNKS = 256
"""Largest number of PNG chunks without pixels or frame headers."""
MAX_PNG_COMPRESSED_TEXTS = 32
"""Largest number of PNG chunks with text that may be compressed. Pillow decompresses each, to at most 1 MiB."""
MAX_GIF_BLOCKS = 4_096
"""Largest number of blocks of comments and other extensions before the first picture of a GIF file."""
MAX_WEBP_CHUNKS = 4_096

_MIB = 2**20
# Bytes per pixel of Pillow's modes; all others take 4.
_BYTES_PER_PIXEL = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2}
# Two canvases of Pillow's WebP decoder, the copy that it returns and the image itself, 4 bytes per pixel each.
_WEBP_BYTES_PER_PIXEL = 16
# The first frame, and a buffer that Pillow prepares to replace it when the second frame is read.
_GIF_BYTES_PER_PIXEL = 2
_JPEG_COEFFICIENT_BYTES = 2
_BMP_RUN_LENGTH = (1, 2)


@dataclass(frozen=True)
class Demand:
    """The resources that decoding a file needs.

    Attributes:
        pixels: Number of pixels, width times height; more for a JPEG file of many scans, by the time that they take.
        memory: Estimated memory in bytes, including the file itself.
    """

    pixels: int
    memory: int


@dataclass(frozen=True)
class Structure:
    """What the structure of a JPEG file says about the cost of decoding it; other files have the defaults.

    Attributes:
        scans: Largest possible number of scans.
        keeps_coefficients: Whether libjpeg keeps the coefficients of the whole image.
        is_scalable: Whether it is decoded at a reduced size if it is large.
    """

    scans: int = 1
    keeps_coefficients: bool = False
    is_scalable: bool = False


def check_structure(data: bytes) -> Structure:
    """Refuses files whose structure makes them expensive to read. Damaged files pass: the decoder names the damage.

    Raises:
        ImageRejected: The file is too expensive. The message names the problem, the limit and the way out.
    """
    if data.startswith(b"\xff\xd8"):
        return _check_jpeg(data)
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        _check_png(data)
    elif data.startswith((b"GIF87a", b"GIF89a")):
        _check_gif(data)
    elif data.startswith(b"RIFF"):
        _check_webp(data)
    elif data.startswith(b"BM"):
        _check_bmp(data)
    return Structure()


def demand_by_header(data: bytes, limits: ImageLimits) -> Demand | None:
    """Demand of a WebP or GIF file, None for other files: Pillow allocates memory when it opens one of these.

    Raises:
        ImageRejected: The image has too many pixels.
    """
    size, bytes_per_pixel = _webp_size(data), _WEBP_BYTES_PER_PIXEL
    if size is None:
        size, bytes_per_pixel = _gif_size(data), _GIF_BYTES_PER_PIXEL
    if size is None:
        return None
    check_size(*size, limits)
    return Demand(size[0] * size[1], size[0] * size[1] * bytes_per_pixel + len(data))


def demand_of(image: Image.Image, file_bytes: int, structure: Structure) -> Demand:
    """Demand of an image that is opened but not decoded.

    Args:
        image: The image.
        file_bytes: Size of its file.
        structure: What `check_structure` returned for it.

    Raises:
        ImageRejected: The width or height is too large.
    """
    width, height = image.size
    if max(width, height) > MAX_DIMENSION:
        raise ImageRejected(
            f"the image has {width} x {height} pixels; at most {MAX_DIMENSION} per side are allowed: send a part of it"
        )
    pixels, rows = width * height, height * struct.calcsize("P")
    if isinstance(image, JpegImagePlugin.JpegImageFile):
        coefficients = pixels * image.layers * _JPEG_COEFFICIENT_BYTES if structure.keeps_coefficients else 0
        # It is decoded at an eighth of its size at best; a quarter is assumed.
        scale = 4 if structure.is_scalable and min(width, height) >= 512 else 1
        # Each scan costs about a third of what decoding a baseline file of the same size does.
        return Demand(
            max(pixels, pixels * structure.scans // 3),
            coefficients + math.ceil(pixels * 4 / scale**2) + rows + file_bytes,
        )
    bytes_per_pixel = {"WEBP": _WEBP_BYTES_PER_PIXEL, "GIF": _GIF_BYTES_PER_PIXEL}.get(image.format or "")
    if bytes_per_pixel is None:
        bytes_per_pixel = _BYTES_PER_PIXEL.get(image.mode, 4)
    return Demand(pixels, pixels * bytes_per_pixel + rows + file_bytes)


def check_memory(demand: Demand, limit: int) -> None:
    """Refuses an image that needs too much memory.

    Raises:
        ImageRejected: It needs more than `limit` bytes.
    """
    if demand.memory > limit:
        raise ImageRejected(
            f"decoding the image needs about {math.ceil(demand.memory / _MIB)} MiB of memory; at most "
            f"{limit // _MIB} MiB are allowed: send fewer pixels, or a baseline JPEG"
        )


def _check_jpeg(data: bytes) -> Structure:
    header = read_jpeg_header(data, MAX_JPEG_SEGMENTS)
    if header.segments > MAX_JPEG_SEGMENTS:
        raise ImageRejected(
            f"the JPEG file has more than {MAX_JPEG_SEGMENTS} segments before its first scan: save it without metadata"
        )
    if header.is_single_scan:  # counting takes longer than all the rest here, so the usual file is spared it
        return Structure(is_scalable=True)
    scans = data.count(SCAN)  # those of thumbnails in the metadata too
    if scans > MAX_SCANS:
        raise ImageRejected(f"the JPEG file has {scans} scans; at most {MAX_SCANS} are allowed: save it as baseline")
    return Structure(scans, keeps_coefficients=True, is_scalable=header.is_scalable)


def _check_png(data: bytes) -> None:
    place, chunks, metadata, texts = 8, 0, 0, 0
    while place + 8 <= len(data):
        kind = data[place + 4 : place + 8]
        chunks += 1
        if kind == b"IEND":
            return
        if kind not in (b"IDAT", b"fdAT", b"fcTL"):
            metadata += 1
            texts += kind in (b"zTXt", b"iTXt")
        if chunks > MAX_PNG_CHUNKS:
            raise ImageRejected(f"the PNG file has more than {MAX_PNG_CHUNKS} chunks: save it again, in larger ones")
        if metadata > MAX_PNG_METADATA_CHUNKS:
            raise ImageRejected(
                f"the PNG file has more than {MAX_PNG_METADATA_CHUNKS} chunks of metadata: save it without metadata"
            )
        if texts > MAX_PNG_COMPRESSED_TEXTS:
            raise ImageRejected(
                f"the PNG file has more than {MAX_PNG_COMPRESSED_TEXTS} text chunks that may be compressed: save it "
                "without metadata"
            )
        place += 12 + int.from_bytes(data[place : place + 4], "big")


def _check_gif(data: bytes) -> None:
    _first_gif_picture(data)


def _first_gif_picture(data: bytes) -> int:
    """Offset of the first picture, after comments and other extensions; or of the end or damage of the file."""
    if len(data) < 13:
        return len(data)
    place, blocks = 13 + _colour_table_bytes(data[10]), 0
    while place < len(data) and data[place : place + 1] not in (b",", b";"):
        extension = data[place : place + 1] == b"!"
        place += 2 if extension else 1  # Pillow skips bytes that begin no block
        while extension and place < len(data) and data[place] and blocks <= MAX_GIF_BLOCKS:
            place += 1 + data[place]
            blocks += 1
        place += extension
        blocks += 1
        if blocks > MAX_GIF_BLOCKS:
            raise ImageRejected(
                f"the GIF file has more than {MAX_GIF_BLOCKS} blocks of comments or extensions before its first "
                "picture: save it without metadata"
            )
    return place


def _colour_table_bytes(flags: int) -> int:
    return 3 * 2 ** ((flags & 7) + 1) if flags & 0x80 else 0


def _check_webp(data: bytes) -> None:
    place, chunks = 12, 0
    while place + 8 <= len(data):
        size = int.from_bytes(data[place + 4 : place + 8], "little")
        place += 8 + size + size % 2
        chunks += 1
        if chunks > MAX_WEBP_CHUNKS:
            raise ImageRejected(
                f"the WebP file has more than {MAX_WEBP_CHUNKS} chunks: send a single picture of the animation"
            )


def _check_bmp(data: bytes) -> None:
    if len(data) < 34 or int.from_bytes(data[14:18], "little") < 40:
        return
    if int.from_bytes(data[30:34], "little") in _BMP_RUN_LENGTH:
        raise ImageRejected(
            "the BMP file is run-length encoded, which is not supported: save it uncompressed or as PNG"
        )


def _webp_size(data: bytes) -> tuple[int, int] | None:
    """Width and height of the canvas, or None if this is not a WebP file with a readable header."""
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP" or len(data) < 30:
        return None
    kind = data[12:16]
    if kind == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + ((bits >> 14) & 0x3FFF)
    if kind == b"VP8 ":
        width, height = struct.unpack("<HH", data[26:30])
        return width & 0x3FFF, height & 0x3FFF
    return None


def _gif_size(data: bytes) -> tuple[int, int] | None:
    """Width and height of the canvas, which the first picture may extend, or None if this is not a GIF file."""
    if not data.startswith((b"GIF87a", b"GIF89a")) or len(data) < 13:
        return None
    width, height = struct.unpack_from("<HH", data, 6)
    place = _first_gif_picture(data)
    if data[place : place + 1] == b"," and len(data) >= place + 9:
        left, top, frame_width, frame_height = struct.unpack_from("<HHHH", data, place + 1)
        width, height = max(width, left + frame_width), max(height, top + frame_height)
    return width, height
