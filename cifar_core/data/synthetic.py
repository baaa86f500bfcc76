"""A generated data set of ten classes, for trying out every command without a download."""

import math

import numpy as np
import numpy.typing as npt

from cifar_core.pixels import IMAGE_SIZE

SYNTHETIC_CLASSES = (
    "disc", "ring", "square", "triangle", "cross", "horizontal stripes", "vertical stripes", "diagonal stripes",
    "checkerboard", "dots",
)  # fmt: skip

Floats = npt.NDArray[np.float64]


def _shape_mask(label: int, x: Floats, y: Floats, rng: np.random.RandomState) -> npt.NDArray[np.bool_]:
    """True where the figure of a class is drawn. Coordinates are about -1 to 1 around its centre."""
    radius = np.hypot(x, y)
    waves = 3.0 + rng.rand()
    # Lambdas, so that only one of the ten masks is computed.
    return [
        lambda: radius < 0.7,
        lambda: (radius > 0.4) & (radius < 0.75),
        lambda: np.maximum(abs(x), abs(y)) < 0.6,
        lambda: (y < 0.6) & (y > 2 * abs(x) - 0.7),
        lambda: (np.minimum(abs(x), abs(y)) < 0.2) & (np.maximum(abs(x), abs(y)) < 0.8),
        lambda: np.sin(waves * math.pi * y) > 0,
        lambda: np.sin(waves * math.pi * x) > 0,
        lambda: np.sin(waves * math.pi * (x + y) / math.sqrt(2)) > 0,
        lambda: (np.sin(waves * math.pi * x) > 0) ^ (np.sin(waves * math.pi * y) > 0),
        lambda: (np.sin(waves * math.pi * x) > 0.35) & (np.sin(waves * math.pi * y) > 0.35),
    ][label]()


def synthetic_images(count: int, seed: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Generates noisy shapes and textures of random colour, position and size on a background of random colour.

    Args:
        count: number of images; all classes are equally frequent, up to one image.
        seed: 0 to 2³² − 1; the same seed gives the same images on every machine.

    Returns:
        Images, uint8 [count, 32, 32, 3], and labels, int64 [count], which index `SYNTHETIC_CLASSES`.
    """
    # numpy promises that the stream of RandomState never changes (NEP 19), but not that of Generator.
    rng = np.random.RandomState(seed)
    rows, columns = np.mgrid[0:IMAGE_SIZE, 0:IMAGE_SIZE] / ((IMAGE_SIZE - 1) / 2) - 1
    labels = rng.permutation(np.arange(count, dtype=np.int64) % len(SYNTHETIC_CLASSES))
    images = np.empty((count, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    for image, label in zip(images, labels, strict=True):
        size = rng.uniform(0.75, 1.15)
        x, y = (columns - rng.uniform(-0.2, 0.2)) / size, (rows - rng.uniform(-0.2, 0.2)) / size
        # Each class has a typical hue, on a background of the opposite hue. This makes the task easy enough for a small
        # network to learn from a thousand images in about 15 seconds.
        hue = 2 * math.pi * (label + rng.uniform(-0.7, 0.7)) / len(SYNTHETIC_CLASSES)
        tint = np.cos(hue - np.array([0.0, 2.0, 4.0]) * math.pi / 3)
        brightness, contrast = rng.uniform(100, 155), rng.uniform(60, 100)
        colour, background = brightness + contrast * tint, brightness - contrast * tint
        mask = _shape_mask(int(label), x, y, rng)[..., None]
        noisy = np.where(mask, colour, background) + rng.normal(0, 18, (IMAGE_SIZE, IMAGE_SIZE, 3))
        image[:] = noisy.clip(0, 255)
    return images, labels
