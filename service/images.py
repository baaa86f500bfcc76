"""Bytes -> uint8 [32, 32, 3]. The only room that opens untrusted files.

Must never know requests, nor what the images are for. A file is turned as its EXIF data says, converted to RGB
(transparent parts white, 16-bit values by their high byte), cropped to its central square, resized with antialiasing;
one that is 32 x 32 RGB already keeps its pixels to the last bit.
"""

import asyncio
import io
import logging
import struct
import time
import warnings
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Importing the plugins registers them; otherwise PIL would import all of its own at the first WebP file.
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)

logger = logging.getLogger(__name__)

SIZE = 32
IMAGE_BYTES = SIZE * SIZE * 3

_PLUGINS = (PngImagePlugin, JpegImagePlugin, WebPImagePlugin, GifImagePlugin, BmpImagePlugin)
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")

# JPEG files are decoded at a reduced size, at least this many times the one needed: faster by far for photographs.
DRAFT_FACTOR = 4
# How long a thread stays with one request's images before another request has its turn.
SLICE_SECONDS = 0.005

# The limit is our own, told to clients and checked before decoding; PIL's would print warnings.
Image.MAX_IMAGE_PIXELS = None
warnings.filterwarnings("ignore", module="PIL")  # what is wrong with a client's file is no news of the server's

_EXIF_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What PIL raises for damaged files, apart from what it documents; fuzzing finds all of these.
_DAMAGED = (
    OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError, TypeError, OverflowError, ArithmeticError,
    struct.error, zlib.error, MemoryError,
)  # fmt: skip


class ImageRejected(ValueError):
    """One image cannot be read. The message is for the client: it says what is wrong and what would be right.

    Attributes:
        internal: The fault is ours, not the image's.
    """

    def __init__(self, message: str, internal: bool = False) -> None:
        super().__init__(message)
        self.internal = internal


@dataclass(frozen=True)
class ImageLimits:
    """What one encoded image may be: bytes of the file, and pixels, width times height."""

    max_bytes: int
    max_pixels: int


def decode(data: bytes, limits: ImageLimits) -> NDArray[np.uint8]:
    """The image in a file, uint8 [32, 32, 3].

    Raises:
        ImageRejected: It is empty, too large, of no known format, or damaged.
    """
    if not data:
        raise ImageRejected("the image is empty: 0 bytes")
    if len(data) > limits.max_bytes:
        raise ImageRejected(f"the image has {len(data)} bytes; at most {limits.max_bytes} are allowed")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_pixels(image, limits.max_pixels)
            return _to_model_input(image)
    except UnidentifiedImageError as error:
        raise ImageRejected(
            f"this is no image in {', '.join(FORMATS)}, or its head is damaged: it begins with {data[:8]!r}"
        ) from error
    except ImageRejected:
        raise
    except _DAMAGED as error:
        raise ImageRejected(f"the image is damaged: {' '.join(str(error).split()) or type(error).__name__}") from error


def _check_pixels(image: Image.Image, limit: int) -> None:
    width, height = image.size
    if width * height > limit:
        raise ImageRejected(f"the image has {width} x {height} = {width * height} pixels; at most {limit} are allowed")


def _to_model_input(image: Image.Image) -> NDArray[np.uint8]:
    orientation = _orientation(image)
    if image.format == "JPEG":
        image.draft(None, (DRAFT_FACTOR * SIZE, DRAFT_FACTOR * SIZE))
    image.load()
    plain = _to_rgb(image)
    width, height = plain.size
    if (width, height) != (SIZE, SIZE):
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        plain = plain.resize(
            (SIZE, SIZE), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side), reducing_gap=3.0
        )
    if plain.mode == "RGBA":
        plain = Image.alpha_composite(Image.new("RGBA", plain.size, "white"), plain).convert("RGB")
    # Cropping and resizing are symmetric, so turning the small image is the same as turning the large one.
    if orientation in _TURNS:
        plain = plain.transpose(_TURNS[orientation])
    return np.asarray(plain)


def _to_rgb(image: Image.Image) -> Image.Image:
    """RGB, or RGBA where there is transparency (resizing weighs colours by it)."""
    if image.mode.startswith("I"):  # 16 bits of grey; PIL would clip them to 255
        values = np.asarray(image).astype(np.int64)
        return Image.fromarray((values.clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        return image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except _DAMAGED:
        return 1  # as every viewer does: damaged notes about an image are no damage of the image


def raw_image(data: bytes) -> NDArray[np.uint8]:
    """The image of raw pixels, uint8 [32, 32, 3].

    Raises:
        ImageRejected: It is not 3,072 bytes.
    """
    if len(data) != IMAGE_BYTES:
        raise ImageRejected(
            f"rgb holds {len(data)} bytes; it must hold {IMAGE_BYTES}: {SIZE} rows of {SIZE} pixels of 3"
        )
    return np.frombuffer(data, np.uint8).reshape(SIZE, SIZE, 3)


def packed_images(data: bytes) -> NDArray[np.uint8]:
    """The images of raw pixels one after another, uint8 [n, 32, 32, 3]; a view, nothing is copied.

    Raises:
        ImageRejected: The length is no multiple of 3,072.
    """
    if len(data) % IMAGE_BYTES:
        raise ImageRejected(
            f"packed_rgb holds {len(data)} bytes; it must hold a multiple of {IMAGE_BYTES}, the bytes of an image"
        )
    return np.frombuffer(data, np.uint8).reshape(-1, SIZE, SIZE, 3)


Decoded = NDArray[np.uint8] | ImageRejected


class Decoder:
    """Decodes the files of many requests in a few threads, a slice of time each: none waits for another's large images.

    Args:
        threads: That decode.
        limits: Of each image.
    """

    def __init__(self, threads: int, limits: ImageLimits) -> None:
        self._threads, self._limits = threads, limits
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")

    async def decode(self, files: Sequence[bytes]) -> list[Decoded]:
        """One image, or the reason why there is none, per file, in order. Cancelled, it decodes no further file."""
        results: list[Decoded | None] = [None] * len(files)
        lanes = min(self._threads, len(files))
        if lanes == 1:
            await self._lane(files, results, 0, 1)
        else:
            await asyncio.gather(*(self._lane(files, results, lane, lanes) for lane in range(lanes)))
        return [result for result in results if result is not None]

    async def _lane(self, files: Sequence[bytes], results: list[Decoded | None], place: int, stride: int) -> None:
        loop = asyncio.get_running_loop()
        while place < len(files):
            place = await loop.run_in_executor(self._pool, self._slice, files, results, place, stride)

    def _slice(self, files: Sequence[bytes], results: list[Decoded | None], place: int, stride: int) -> int:
        end = time.monotonic() + SLICE_SECONDS
        while place < len(files):
            try:
                results[place] = decode(files[place], self._limits)
            except ImageRejected as rejection:
                results[place] = rejection
            except Exception:  # a fault of the decoder must not cost the other images their answers
                logger.exception("the decoder failed on an image of %d bytes", len(files[place]))
                results[place] = ImageRejected(
                    "the decoder failed on this image; the server's log says why", internal=True
                )
            place += stride
            if time.monotonic() >= end:
                break
        return place

    def close(self) -> None:
        """Ends the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)
