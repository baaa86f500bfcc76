"""Turns a caller's images into contents that fit into requests. Knows the messages, but no channels or threads."""

import errno
import io
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PillowImage

from cifar_core.pixels import IMAGE_BYTES, IMAGE_SIZE
from service.client.files import read_image
from service.generated.cifar.v1 import image_classifier_pb2 as messages

ImageSource: TypeAlias = "str | os.PathLike[str] | bytes | PillowImage.Image | NDArray[np.uint8]"
Images: TypeAlias = "Iterable[ImageSource] | NDArray[np.uint8]"

# A protobuf message holds less than 2 GiB, whatever the server accepts.
_LARGEST_FILE = 2**31 - 2**20
# Bytes of a message that are not images: its other fields, and tags and lengths of each image.
_MESSAGE_OVERHEAD, _IMAGE_OVERHEAD = 1024, 16

_PNG_MODES = frozenset({"1", "L", "LA", "I;16", "P", "RGB", "RGBA"})
# What becomes of Pillow's other modes: as in the server's decoder, colours become RGB, and transparency is kept. Float
# values (F) are refused, because nothing says which of them is white.
_CONVERTED = {
    "CMYK": "RGB", "YCbCr": "RGB", "HSV": "RGB", "LAB": "RGB", "RGBX": "RGB", "PA": "RGBA", "RGBa": "RGBA", "La": "LA",
}  # fmt: skip
_EXIF_ORIENTATION, _TURNED = 0x0112, range(2, 9)
# Pillow raises all of these for images that are damaged, closed or empty; it documents only some of them.
_UNREADABLE = (
    OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError, TypeError, AttributeError, ArithmeticError,
    AssertionError, ImportError, SystemError, struct.error, zlib.error, PillowImage.DecompressionBombError,
)  # fmt: skip


@dataclass(frozen=True)
class Capacity:
    """How much one request may hold.

    Attributes:
        images: Number of images.
        size: Bytes of all images.
    """

    images: int
    size: int

    @classmethod
    def of(cls, limits: messages.Limits, requests: int) -> "Capacity":
        """The capacity that the server's limits leave, if one call sends this many requests to it at once."""
        images = limits.max_images
        if limits.max_queued_images:  # a call whose requests the server cannot hold together would refuse itself
            images = min(images, limits.max_queued_images // requests)
        return cls(max(1, images), limits.max_message_bytes - _MESSAGE_OVERHEAD)


class Content:
    """Images of one call that travel in one request: either `images` or `pixels` holds them. Must not be changed.

    Or one image that cannot be sent: `error` says why, and is its answer.

    Args:
        images: Image files, or a mixture of image files and raw pixels.
        pixels: Raw pixels of images, 3,072 bytes each.
        error: Why the only image of this content cannot be sent.

    Attributes:
        count: Number of images.
        size: Bytes that the images take in a message, or a few more.
    """

    __slots__ = ("count", "error", "images", "pixels", "size")

    def __init__(self, images: tuple[messages.Image, ...] = (), pixels: bytes = b"", error: str | None = None) -> None:
        self.images, self.pixels, self.error = images, pixels, error
        self.count = 1 if error is not None else len(images) or len(pixels) // IMAGE_BYTES
        self.size = len(pixels) or sum(map(_size, images))

    def fits(self, capacity: Capacity) -> bool:
        """Whether one request can hold it."""
        return self.count <= capacity.images and self.size <= capacity.size

    def split(self, capacity: Capacity) -> "list[Content]":
        """The same images in the same order, in contents that fit; an image that is too large becomes an error."""
        if self.pixels:
            length = _count_of_pixels(capacity) * IMAGE_BYTES
            parts = [Content(pixels=self.pixels[at : at + length]) for at in range(0, len(self.pixels), length)]
        else:
            parts = list(_grouped(self.images, lambda: capacity))
        return [part if part.fits(capacity) else Content(error=_too_large(part.size, capacity)) for part in parts]


def contents(images: Images, capacity: Callable[[], Capacity]) -> Iterator[Content]:
    """Packs images into as few contents as the capacity allows, and reads files no earlier than needed.

    An image that is larger than the capacity gets a content of its own, and so does one that cannot be encoded.

    Args:
        images: A list of images, or uint8 [n, 32, 32, 3].
        capacity: Called for each content, because the server's limits can change.

    Raises:
        OSError: A path cannot be read, or is not a regular file.
        ValueError: An array does not have the type and shape of images.
        TypeError: `images` is a single image instead of a list, or no list, or holds something that is not an image.
    """
    if isinstance(images, np.ndarray) and images.ndim == 4:
        return _of_array(images, capacity)
    if isinstance(images, (str, os.PathLike, bytes, PillowImage.Image, np.ndarray)):
        raise TypeError(
            f"images is a single {type(images).__name__}; it must be a list of images, or one array of many"
        )
    try:
        sources = iter(images)
    except TypeError:
        raise TypeError(f"images is {images!r:.80}; it must be a list of images, or one array of many") from None
    return _grouped((_image(source) for source in sources), capacity)


def check_pixels(images: NDArray[np.uint8]) -> None:
    """Refuses an array that does not hold raw images.

    Raises:
        ValueError: It is not uint8 [n, 32, 32, 3].
    """
    if images.dtype != np.uint8 or images.shape[1:] != (IMAGE_SIZE, IMAGE_SIZE, 3):
        raise ValueError(
            f"the array is {images.dtype} {list(images.shape)}; it must be uint8 [n, {IMAGE_SIZE}, {IMAGE_SIZE}, 3]"
        )


def _of_array(images: NDArray[np.uint8], capacity: Callable[[], Capacity]) -> Iterator[Content]:
    check_pixels(images)
    start = 0
    while start < len(images):
        count = _count_of_pixels(capacity())
        yield Content(pixels=images[start : start + count].tobytes())
        start += count


def _count_of_pixels(capacity: Capacity) -> int:
    return max(1, min(capacity.images, capacity.size // IMAGE_BYTES))


def _grouped(images: Iterable[messages.Image | str], capacity: Callable[[], Capacity]) -> Iterator[Content]:
    """Groups images; a string says why an image cannot be sent."""
    group: list[messages.Image] = []
    size = 0
    for image in images:
        if isinstance(image, str):
            if group:
                yield _content(group)
                group, size = [], 0
            yield Content(error=image)
            continue
        limit = capacity()
        if group and (len(group) >= limit.images or size + _size(image) > limit.size):
            yield _content(group)
            group, size = [], 0
        group.append(image)
        size += _size(image)
    if group:
        yield _content(group)


def _content(images: Sequence[messages.Image]) -> Content:
    if all(image.WhichOneof("content") == "rgb" for image in images):
        return Content(pixels=b"".join(image.rgb for image in images))
    return Content(images=tuple(images))


def _size(image: messages.Image) -> int:
    return image.ByteSize() + _IMAGE_OVERHEAD


def _too_large(size: int, capacity: Capacity) -> str:
    return (
        f"the image takes {size} bytes, but must take at most {capacity.size} to fit into a message to the server; "
        "send a smaller image, or the path or bytes of a compressed file instead of a PIL image or an array"
    )


def _image(source: ImageSource) -> messages.Image | str:
    """The image as it is sent, or why it cannot be encoded."""
    if isinstance(source, bytes):
        return _too_large_for_any(len(source)) or messages.Image(encoded=source)
    if isinstance(source, (str, os.PathLike)):
        return _of_file(Path(source))
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3:
            raise ValueError(f"an image is {source.dtype} {list(source.shape)}; it must be uint8 [height, width, 3]")
        if source.shape == (IMAGE_SIZE, IMAGE_SIZE, 3):
            return messages.Image(rgb=source.tobytes())
        # Pillow refuses empty arrays of some shapes itself, with an exception that says less.
        if not source.size:
            return f"the image is empty: {source.shape[1]} x {source.shape[0]} pixels"
        source = PillowImage.fromarray(source)
    if not isinstance(source, PillowImage.Image):
        raise TypeError(f"an image is {type(source).__name__}; it must be a path, bytes, a PIL image or a uint8 array")
    try:
        return messages.Image(encoded=_png(source))
    except _UNREADABLE as error:
        return f"the PIL image cannot be encoded: {' '.join(str(error).split()) or type(error).__name__}"


def _of_file(path: Path) -> messages.Image | str:
    """The file as it is sent, or why it cannot be.

    Raises:
        OSError: It cannot be read, or is no regular file: reading a pipe would wait beyond the call's timeout.
    """
    try:
        size = path.stat().st_size
    except ValueError as error:  # a null character
        raise OSError(errno.EINVAL, str(error), str(path)) from error
    return _too_large_for_any(size) or messages.Image(encoded=read_image(path, _LARGEST_FILE))


def _too_large_for_any(size: int) -> str | None:
    if size <= _LARGEST_FILE:
        return None
    return f"the image takes {size} bytes, but a message holds at most {_LARGEST_FILE}; send a smaller image"


def _png(image: PillowImage.Image) -> bytes:
    """The image as a PNG file, with the EXIF orientation but no other metadata.

    Raises:
        ValueError: The image has a mode that cannot be converted. Pillow raises any of `_UNREADABLE`.
    """
    image.load()  # first, because a TIFF image turns itself when it is loaded
    orientation = _orientation(image)
    if image.mode not in _PNG_MODES:
        image = _converted(image)
    exif = PillowImage.Exif()
    if orientation in _TURNED:
        exif[_EXIF_ORIENTATION] = orientation
    file = io.BytesIO()
    # An empty profile, because that of the image may not be one for the mode of the file. The server reads none.
    image.save(file, "PNG", compress_level=1, icc_profile=b"", exif=exif if orientation in _TURNED else b"")
    return file.getvalue()


def _converted(image: PillowImage.Image) -> PillowImage.Image:
    """The image in a mode that PNG has."""
    if image.mode.startswith("I"):  # grey of 16 bits, also where Pillow keeps it in 32
        grey = PillowImage.fromarray(np.asarray(image).clip(0, 2**16 - 1).astype(np.uint16))
        grey.info = dict(image.info)
        return grey
    if image.mode not in _CONVERTED:
        raise ValueError(
            f"its mode is {image.mode}, but must be one that has a defined conversion to RGB; convert it to RGB"
        )
    return image.convert(_CONVERTED[image.mode])


def _orientation(image: PillowImage.Image) -> int:
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except _UNREADABLE:
        return 1  # as in the server's decoder: damaged metadata does not make the pixels unreadable
