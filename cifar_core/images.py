"""Image file bytes -> uint8 [32, 32, 3]. The only decoder: training folders and the server both use it.

Must not import torch. A file is decoded as follows: rotated or mirrored as its EXIF orientation says; converted to RGB,
with transparent parts placed on white and 16-bit values reduced to their high byte; cropped to its central square;
resized to 32 x 32 with antialiasing. The pixels of a file that is 32 x 32 RGB already are not changed at all.
"""

import io
import struct
import warnings
import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Importing a plugin registers it; otherwise Pillow would import all of its plugins at the first WebP file.
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)

IMAGE_SIZE = 32
"""Height and width of a decoded image, in pixels."""
IMAGE_BYTES = IMAGE_SIZE * IMAGE_SIZE * 3

_PLUGINS = (PngImagePlugin, JpegImagePlugin, WebPImagePlugin, GifImagePlugin, BmpImagePlugin)
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")
"""File names that the folder loader takes for images, in lower case."""

DECODER_VERSION = 1
"""Part of the key of caches of decoded images: raise it whenever the pixels of any file change."""

# libjpeg decodes a JPEG file at half, a quarter or an eighth of its size, at least this many times the size needed.
_DRAFT_FACTOR = 4

# `ImageLimits` is checked before decoding, with a message of our own; Pillow would print warnings instead.
Image.MAX_IMAGE_PIXELS = None
warnings.filterwarnings("ignore", module="PIL")

_EXIF_ORIENTATION = 0x0112
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What Pillow raises for damaged files besides its documented exceptions; fuzzing finds all of these.
_DAMAGED = (
    OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError, TypeError, OverflowError, ArithmeticError,
    struct.error, zlib.error,
)  # fmt: skip


class ImageRejected(ValueError):
    """One image cannot be read. The message is for whoever sent it: what is wrong, the limit, the way out.

    Attributes:
        internal: The fault is the decoder's and not the image's.
    """

    def __init__(self, message: str, internal: bool = False) -> None:
        super().__init__(message)
        self.internal = internal


@dataclass(frozen=True)
class ImageLimits:
    """What one image file may be.

    Attributes:
        max_bytes: Size of the file in bytes.
        max_pixels: Width times height.
    """

    max_bytes: int
    max_pixels: int


def decode(data: bytes, limits: ImageLimits | None = None) -> NDArray[np.uint8]:
    """Decodes an image file.

    Args:
        data: The content of a file in one of `FORMATS`; of an animation the first frame counts.
        limits: None for a file of one's own, of any size.

    Returns:
        uint8 [32, 32, 3], RGB.

    Raises:
        ImageRejected: The file is empty, too large, of no supported format, or damaged.
    """
    if not data:
        raise ImageRejected("the image is empty: 0 bytes")
    if limits and len(data) > limits.max_bytes:
        raise ImageRejected(f"the image has {len(data)} bytes; at most {limits.max_bytes} are allowed")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if limits:
                _check_pixels(image, limits.max_pixels)
            return _to_model_input(image)
    except UnidentifiedImageError as error:
        raise ImageRejected(
            f"this is no image in {', '.join(FORMATS)}, or its header is damaged: it begins with {data[:8]!r}"
        ) from error
    except ImageRejected:
        raise
    except MemoryError as error:
        raise ImageRejected("decoding the image needs more memory than is allowed; send a smaller one") from error
    except _DAMAGED as error:
        raise ImageRejected(f"the image is damaged: {' '.join(str(error).split()) or type(error).__name__}") from error


def _check_pixels(image: Image.Image, limit: int) -> None:
    width, height = image.size
    if width * height > limit:
        raise ImageRejected(f"the image has {width} x {height} = {width * height} pixels; at most {limit} are allowed")


def _to_model_input(image: Image.Image) -> NDArray[np.uint8]:
    orientation = _orientation(image)
    if image.format == "JPEG":
        image.draft(None, (_DRAFT_FACTOR * IMAGE_SIZE, _DRAFT_FACTOR * IMAGE_SIZE))
    image.load()
    converted = _to_rgb(image)
    width, height = converted.size
    if (width, height) != (IMAGE_SIZE, IMAGE_SIZE):
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        converted = converted.resize(
            (IMAGE_SIZE, IMAGE_SIZE),
            Image.Resampling.BICUBIC,
            box=(left, top, left + side, top + side),
            reducing_gap=3.0,
        )
    if converted.mode == "RGBA":
        converted = Image.alpha_composite(Image.new("RGBA", converted.size, "white"), converted).convert("RGB")
    # Cropping and resizing are symmetric, so transposing the small image equals transposing the large one.
    if orientation in _TRANSPOSE:
        converted = converted.transpose(_TRANSPOSE[orientation])
    return np.asarray(converted)


def _to_rgb(image: Image.Image) -> Image.Image:
    """RGB, or RGBA if there is transparency: resizing then weights colours by their opacity."""
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion would clip at 255
        high_bytes = (np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8)
        return Image.fromarray(high_bytes).convert("RGB")
    if image.has_transparency_data:
        return image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except _DAMAGED:
        return 1  # damaged metadata does not make the pixels unreadable: every viewer shows such a file


def raw_image(data: bytes) -> NDArray[np.uint8]:
    """The image of raw pixels, uint8 [32, 32, 3]; a view, nothing is copied.

    Raises:
        ImageRejected: The length is not 3,072 bytes.
    """
    if len(data) != IMAGE_BYTES:
        raise ImageRejected(
            f"rgb holds {len(data)} bytes; it must hold {IMAGE_BYTES}: "
            f"{IMAGE_SIZE} rows of {IMAGE_SIZE} pixels of 3 bytes"
        )
    return np.frombuffer(data, np.uint8).reshape(IMAGE_SIZE, IMAGE_SIZE, 3)


def packed_images(data: bytes) -> NDArray[np.uint8]:
    """Raw images one after another, uint8 [n, 32, 32, 3]; a view, nothing is copied.

    Raises:
        ImageRejected: The length is not a multiple of 3,072 bytes.
    """
    if len(data) % IMAGE_BYTES:
        raise ImageRejected(
            f"packed_rgb holds {len(data)} bytes; it must hold a multiple of {IMAGE_BYTES}, the bytes of one image"
        )
    return np.frombuffer(data, np.uint8).reshape(-1, IMAGE_SIZE, IMAGE_SIZE, 3)
