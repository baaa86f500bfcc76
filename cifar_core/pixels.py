"""Decoded images, uint8 [32, 32, 3] in RGB order: their size, limits on image files, and the reason why one is refused.

Must not import Pillow: the process of the server that talks to clients uses this module, and only its decode processes
open image files.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IMAGE_SIZE = 32
"""Height and width of a decoded image, in pixels."""
IMAGE_BYTES = IMAGE_SIZE * IMAGE_SIZE * 3

EXTENSIONS = (".apng", ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".webp")
"""Ends of the names of image files, in lower case: those that Pillow knows for the formats of `cifar_core.images`.

Training folders, `cifar-classify` and `service.score` leave out other files. The server looks at the content only.
"""


class ImageRejected(ValueError):
    """One image cannot be read. The message, for its sender, says what is wrong, the limit and the way out.

    Attributes:
        internal: Whether the decoder is at fault and not the image.
    """

    def __init__(self, message: str, internal: bool = False) -> None:
        super().__init__(message)
        self.internal = internal


@dataclass(frozen=True)
class ImageLimits:
    """Limits on one image file.

    Attributes:
        max_bytes: Largest size of the file in bytes.
        max_pixels: Largest number of pixels, width times height.
    """

    max_bytes: int
    max_pixels: int


def check_size(width: int, height: int, limits: ImageLimits) -> None:
    """Checks the number of pixels of an image.

    Raises:
        ImageRejected: The image has too many pixels.
    """
    if width * height > limits.max_pixels:
        raise ImageRejected(
            f"the image has {width} x {height} = {width * height} pixels; at most {limits.max_pixels} are allowed"
        )


def raw_image(data: bytes) -> NDArray[np.uint8]:
    """Raw pixels as an image, uint8 [32, 32, 3]; a view, nothing is copied.

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
