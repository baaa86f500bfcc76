"""Image file bytes -> uint8 [32, 32, 3]. The only decoder: training folders and the server both use it.

Must not import torch. A file is decoded as follows: only the first frame of an animation is read; it is cropped to its
central square; converted to RGB, with transparent parts placed on white and 16-bit values reduced to their high byte;
resized to 32 x 32 with antialiasing; and rotated or mirrored as the EXIF orientation says. The pixels of a file that is
32 x 32 RGB already do not change, except by the orientation.
"""

import contextlib
import io
import math
import struct
import warnings
import zlib
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

# Importing a plugin registers it; otherwise Pillow would import all of its plugins at the first WebP file.
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    MpoImagePlugin,
    PngImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)

from cifar_core.jpeg import read_jpeg_header
from cifar_core.pixels import IMAGE_SIZE, ImageLimits, ImageRejected, check_size

# Pillow gives a JPEG file of several pictures, as cameras write them, to the plugin for MPO.
_PLUGINS = (PngImagePlugin, JpegImagePlugin, MpoImagePlugin, WebPImagePlugin, GifImagePlugin, BmpImagePlugin)
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")

DECODER_VERSION = 4
"""Part of the key of caches of decoded images: raise it whenever the pixels of any file change."""

# libjpeg can decode a JPEG file at a half, a quarter or an eighth of its size. It decodes at the smallest of these
# that is at least this many times the size of the result; smaller ones cost accuracy (benchmarks/reduced_jpeg.py).
_JPEG_FACTOR = 2
# A larger image is reduced by an integer factor to about this many times the size of the result, and then resized.
_REDUCED_FACTOR = 3
# Large images are converted in strips of about this many pixels, so that no second copy of the whole image is needed.
_STRIP_PIXELS = 2**18

# `ImageLimits` is checked before decoding, with a message of our own; Pillow would print warnings instead.
Image.MAX_IMAGE_PIXELS = None
warnings.filterwarnings("ignore", module="PIL")

# What a value of Pillow's encodings of grey with 2 and 4 bits is multiplied by.
_GREY_SCALES = {"L;2": 85, "L;4": 17}
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
# Pillow raises all of these for damaged files; it documents only some of them.
_DAMAGED = (
    OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError, TypeError, OverflowError, ArithmeticError,
    AssertionError, struct.error, zlib.error,
)  # fmt: skip


def decode(data: bytes, limits: ImageLimits | None = None) -> NDArray[np.uint8]:
    """Decodes an image file.

    Args:
        data: The content of a file in one of `FORMATS`.
        limits: Limits on the file; None for a trusted file of any size.

    Returns:
        uint8 [32, 32, 3], RGB.

    Raises:
        ImageRejected: The file is empty, too large, damaged, or its format is not supported.
    """
    with opened(data, limits) as image:
        return pixels_of(image, scalable=data.startswith(b"\xff\xd8") and read_jpeg_header(data).is_scalable)


@contextlib.contextmanager
def opened(data: bytes, limits: ImageLimits | None = None) -> Iterator[Image.Image]:
    """Opens an image file: its header is read, its pixels are not decoded yet.

    Arguments and errors are those of `decode`; errors of Pillow inside the `with` block are translated as well.
    """
    if not data:
        raise ImageRejected("the image is empty: 0 bytes")
    if limits and len(data) > limits.max_bytes:
        raise ImageRejected(f"the image has {len(data)} bytes; at most {limits.max_bytes} are allowed")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if limits:
                check_size(*image.size, limits)
            yield image
    except UnidentifiedImageError as error:
        raise ImageRejected(
            f"the data is not an image in {', '.join(FORMATS)}, or its header is damaged: it begins with {data[:8]!r}"
        ) from error
    except ImageRejected:
        raise
    except MemoryError as error:
        raise ImageRejected("decoding the image needs more memory than is allowed; send a smaller image") from error
    except _DAMAGED as error:
        reason = " ".join(str(error).split())
        raise ImageRejected(f"the image is damaged: {reason}" if reason else "the image is damaged") from error


def pixels_of(image: Image.Image, *, scalable: bool) -> NDArray[np.uint8]:
    """Decodes an opened image: uint8 [32, 32, 3], RGB. Raises the exceptions of Pillow.

    Args:
        image: The image.
        scalable: Whether its file is a JPEG file whose header `is_scalable`; see `cifar_core.jpeg`.
    """
    _scale_transparent_colour(image)  # before the metadata, for which Pillow decodes a PNG file
    orientation = _orientation(image)
    extent: tuple[float, float] = image.size
    if scalable and isinstance(image, JpegImagePlugin.JpegImageFile):
        extent = _reduce_jpeg(image)
    image.load()
    small = _resized_square(image, extent)
    # Cropping and resizing are symmetric, so transposing the small image equals transposing the large one.
    if orientation in _TRANSPOSE:
        small = small.transpose(_TRANSPOSE[orientation])
    if small.mode == "L":
        small = small.convert("RGB")
    pixels = np.asarray(small)
    if small.mode == "RGB":
        return pixels
    # The colours are already multiplied by their opacity, so the missing part is added in white. Resizing overshoots at
    # edges, where a colour may exceed its opacity.
    white = 255 - pixels[..., 3:].astype(np.int16)
    return (pixels[..., :3] + white).clip(0, 255).astype(np.uint8)


def _reduce_jpeg(image: JpegImagePlugin.JpegImageFile) -> tuple[float, float]:
    """Has libjpeg decode the image at a half, a quarter or an eighth of its size, if that is large enough.

    Returns:
        Width and height of the picture in the pixels of that size: whole numbers unless it ends within a pixel.
    """
    drafted = image.draft(None, (_JPEG_FACTOR * IMAGE_SIZE, _JPEG_FACTOR * IMAGE_SIZE))
    return drafted[1][2:] if drafted else image.size


def _resized_square(image: Image.Image, extent: tuple[float, float]) -> Image.Image:
    """The central square, 32 x 32: RGB, L if it is grey, or RGBa (colours multiplied by opacity) if it is transparent.

    Args:
        image: The image.
        extent: The part of its width and height that the picture takes, from the left and from the top, in pixels.
    """
    width, height = extent
    if width == height == IMAGE_SIZE:
        return _converted(image)
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    factor = int(side) // (_REDUCED_FACTOR * IMAGE_SIZE)
    if factor > 1:
        reduced = _reduced(image, (int(left), int(top), math.ceil(left + side), math.ceil(top + side)), factor)
        left, top, side_reduced = (left - int(left)) / factor, (top - int(top)) / factor, side / factor
    else:
        reduced, side_reduced = _converted(image), side
    box = (left, top, left + side_reduced, top + side_reduced)
    return reduced.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC, box=box)


def _reduced(image: Image.Image, box: tuple[int, int, int, int], factor: int) -> Image.Image:
    """A part of an image, converted and averaged over blocks of factor x factor pixels."""
    left, top, right, bottom = box
    rows = max(1, _STRIP_PIXELS // (right - left) // factor) * factor
    strips = [
        _converted(image.crop((left, start, right, min(start + rows, bottom)))).reduce(factor)
        for start in range(top, bottom, rows)
    ]
    if len(strips) == 1:
        return strips[0]
    reduced = Image.new(strips[0].mode, (strips[0].width, sum(strip.height for strip in strips)))
    start = 0
    for strip in strips:
        reduced.paste(strip, (0, start))
        start += strip.height
    return reduced


def _converted(image: Image.Image) -> Image.Image:
    """RGB, or RGBa if there is transparency: resizing then weights colours by their opacity.

    Grey stays grey: resizing three equal colours takes longer and gives the same pixels.
    """
    if image.mode.startswith("I"):
        return _from_16_bits(image)
    if image.has_transparency_data:
        return image.convert("RGBA").convert("RGBa")
    return image if image.mode in ("RGB", "L") else image.convert("RGB")


def _scale_transparent_colour(image: Image.Image) -> None:
    """Pillow scales the pixels of PNG files with 2, 4 and 16 bits to 8 bits, but not the colour that is transparent.

    Colours of 16 bits that differ in their low bytes only become one. 16-bit grey is not scaled; see `_from_16_bits`.
    """
    colour, tiles = image.info.get("transparency"), getattr(image, "tile", [])
    encoding = tiles[0][3] if tiles else None
    if encoding in _GREY_SCALES and isinstance(colour, int):
        image.info["transparency"] = colour * _GREY_SCALES[encoding]
    elif encoding == "RGB;16B" and isinstance(colour, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in colour)


def _from_16_bits(image: Image.Image) -> Image.Image:
    """16-bit grey, which Pillow's own conversion would clip at 255."""
    values = np.asarray(image)
    grey = Image.fromarray((values >> 8).astype(np.uint8))
    transparent = image.info.get("transparency")
    if transparent is None:
        return grey
    grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey.convert("RGBA").convert("RGBa")


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except _DAMAGED:
        return 1  # damaged metadata does not make the pixels unreadable: every viewer shows such a file
