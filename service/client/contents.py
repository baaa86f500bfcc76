"""Turns a caller's images into contents that fit into requests. Knows the messages, but no channels or threads."""

import io
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PillowImage

from cifar_core.pixels import IMAGE_BYTES, IMAGE_SIZE
from service.generated.cifar.v1 import image_classifier_pb2 as messages

ImageSource: TypeAlias = "str | os.PathLike[str] | bytes | PillowImage.Image | NDArray[np.uint8]"
Images: TypeAlias = "Iterable[ImageSource] | NDArray[np.uint8]"

# Bytes of a message that are not images: its other fields, and tags and lengths of each image.
_MESSAGE_OVERHEAD, _IMAGE_OVERHEAD = 1024, 16


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
    def of(cls, limits: messages.Limits) -> "Capacity":
        """The capacity that the server's limits leave."""
        return cls(max(1, limits.max_images), limits.max_message_bytes - _MESSAGE_OVERHEAD)


class Content:
    """Images of one call that travel in one request: either `images` or `pixels` holds them. Must not be changed.

    Args:
        images: Image files, or a mixture of image files and raw pixels.
        pixels: Raw pixels of images, 3,072 bytes each.

    Attributes:
        count: Number of images.
        size: Bytes that the images take in a message, or a few more.
    """

    __slots__ = ("count", "images", "pixels", "size")

    def __init__(self, images: tuple[messages.Image, ...] = (), pixels: bytes = b"") -> None:
        self.images, self.pixels = images, pixels
        self.count = len(images) or len(pixels) // IMAGE_BYTES
        self.size = len(pixels) or sum(map(_size, images))

    def fits(self, capacity: Capacity) -> bool:
        """Whether one request can hold it."""
        return self.count <= capacity.images and self.size <= capacity.size

    def split(self, capacity: Capacity) -> "list[Content]":
        """The same images in the same order, in contents that fit; an image that is too large gets its own content."""
        if self.pixels:
            length = _count_of_pixels(capacity) * IMAGE_BYTES
            return [Content(pixels=self.pixels[at : at + length]) for at in range(0, len(self.pixels), length)]
        return list(_grouped(self.images, lambda: capacity))


def contents(images: Images, capacity: Callable[[], Capacity]) -> Iterator[Content]:
    """Packs images into as few contents as the capacity allows, and reads files no earlier than needed.

    Args:
        images: A list of images, or uint8 [n, 32, 32, 3].
        capacity: Called for each content, because the server's limits can change.

    Raises:
        OSError: A path cannot be read.
        ValueError: An array does not have the type and shape of images.
        TypeError: `images` is a single image instead of a list, or holds something that is not an image.
    """
    if isinstance(images, np.ndarray) and images.ndim == 4:
        return _of_array(images, capacity)
    if isinstance(images, (str, os.PathLike, bytes, PillowImage.Image, np.ndarray)):
        raise TypeError(
            f"images is a single {type(images).__name__}; it must be a list of images, or one array of many"
        )
    return _grouped((_image(source) for source in images), capacity)


def _of_array(images: NDArray[np.uint8], capacity: Callable[[], Capacity]) -> Iterator[Content]:
    if images.dtype != np.uint8 or images.shape[1:] != (IMAGE_SIZE, IMAGE_SIZE, 3):
        raise ValueError(
            f"the array is {images.dtype} {list(images.shape)}; it must be uint8 [n, {IMAGE_SIZE}, {IMAGE_SIZE}, 3]"
        )
    start = 0
    while start < len(images):
        count = _count_of_pixels(capacity())
        yield Content(pixels=images[start : start + count].tobytes())
        start += count


def _count_of_pixels(capacity: Capacity) -> int:
    return max(1, min(capacity.images, capacity.size // IMAGE_BYTES))


def _grouped(images: Iterable[messages.Image], capacity: Callable[[], Capacity]) -> Iterator[Content]:
    group: list[messages.Image] = []
    size = 0
    for image in images:
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


def _image(source: ImageSource) -> messages.Image:
    if isinstance(source, bytes):
        return messages.Image(encoded=source)
    if isinstance(source, (str, os.PathLike)):
        return messages.Image(encoded=Path(source).read_bytes())
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3:
            raise ValueError(f"an image is {source.dtype} {list(source.shape)}; it must be uint8 [height, width, 3]")
        if source.shape == (IMAGE_SIZE, IMAGE_SIZE, 3):
            return messages.Image(rgb=source.tobytes())
        source = PillowImage.fromarray(source)
    if not isinstance(source, PillowImage.Image):
        raise TypeError(f"an image is {type(source).__name__}; it must be a path, bytes, a PIL image or a uint8 array")
    file = io.BytesIO()
    source.save(file, "PNG", compress_level=1, exif=source.getexif())
    return messages.Image(encoded=file.getvalue())
