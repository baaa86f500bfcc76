"""A folder of image files -> uint8 arrays, decoded once and cached. The only room of the library that opens images.

The folder holds `train/<class>/*` and `test/<class>/*`, as `torchvision.datasets.ImageFolder` reads them. Knows nothing
of training.
"""

import hashlib
import logging
import os
import zipfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps
from tqdm import tqdm

from cifar_core.errors import CifarError
from cifar_core.models import IMAGE_SIZE

logger = logging.getLogger(__name__)

_CACHE_VERSION = 1
_ARRAYS = ("train_images", "train_labels", "test_images", "test_labels", "classes")

Split = tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]
"""Images [N, 32, 32, 3] and their labels [N]."""


class DataError(CifarError):
    """Data that is not there, incomplete, corrupt or of the wrong form."""


OTHER_DATA = (
    "; or use other data: --data cifar10 (the official archive), --data FOLDER (train/<class>/* and test/<class>/*), "
    "or --data synthetic (no download)"
)
"""The second way out, which every error of reading data ends with."""


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits a pixel; Pillow's own conversion clips at 255 instead of scaling
        image = Image.fromarray((np.asarray(image).clip(0, 2**16 - 1) // 256).astype(np.uint8))
    return image.convert("RGB")


def decode_image(path: str | Path) -> npt.NDArray[np.uint8]:
    """One image file as RGB uint8 [32, 32, 3]; another size is cropped to its central square and resized.

    Raises:
        DataError: not an image that can be read, naming the file.
    """
    try:
        with Image.open(path) as opened:
            image = _to_rgb(ImageOps.exif_transpose(opened))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        # Pillow raises all of these for files that are not what their name says.
        raise DataError(
            f"{path}: cannot be read as an image ({error}); replace or remove this file{OTHER_DATA}"
        ) from error
    if image.size != (IMAGE_SIZE, IMAGE_SIZE):
        image = ImageOps.fit(image, (IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
    return np.asarray(image)


def _decode_split(folder: Path) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64], list[str]]:
    """All images of `<folder>/<class>/*`, in the order of class and file name."""
    import torchvision

    try:
        listing = torchvision.datasets.ImageFolder(folder)
    except FileNotFoundError as error:  # no class at all, or a class without an image
        raise DataError(f"{folder}: {error}; add images or remove the empty class{OTHER_DATA}") from error
    if len(listing.classes) < 2:
        raise DataError(
            f"{folder}: holds one class only ({listing.classes[0]}), at least 2 are needed; add one{OTHER_DATA}"
        )
    images = np.empty((len(listing.samples), IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    # disable=None: no bar where nobody watches, such as a log file.
    for row, (path, _) in enumerate(tqdm(listing.samples, desc=f"decoding {folder.name}", unit="image", disable=None)):
        images[row] = decode_image(path)
    return images, np.asarray(listing.targets, np.int64), listing.classes


def _content_key(folder: Path) -> str:
    """Changes when a file below train/ or test/ is added, removed, renamed or written.

    From names, sizes and times as the file system tells them: reading 60,000 files would take longer than a start may.
    The change time (ctime) is among them since, unlike the modification time, no program can set it.
    """
    digest = hashlib.sha256(f"{_CACHE_VERSION}".encode())
    for split in ("train", "test"):
        for directory in sorted(os.scandir(folder / split), key=lambda entry: entry.name):
            if not directory.is_dir():
                continue
            digest.update(f"\n{split}/{directory.name}".encode())
            # Files in deeper folders count for ImageFolder too.
            for path, _, names in sorted(os.walk(directory.path, followlinks=True)):
                for name in sorted(names):
                    status = os.stat(os.path.join(path, name))  # noqa: PTH116, PTH118 (three times as fast as pathlib)
                    digest.update(
                        f"{path}/{name}\0{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}\n".encode()
                    )
    return digest.hexdigest()


def _cache_file(folder: Path) -> Path:
    """One file a folder, so that a folder that changes does not leave its earlier states behind."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "cifar-core" / (hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16] + ".npz")


def _read_cache(file: Path, key: str) -> tuple[Split, Split, list[str]] | None:
    try:
        with np.load(file, allow_pickle=False) as arrays:
            if str(arrays["key"]) != key:
                return None
            train_images, train_labels, test_images, test_labels, classes = (arrays[name] for name in _ARRAYS)
            return (train_images, train_labels), (test_images, test_labels), classes.tolist()
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        logger.warning("%s: this cache cannot be read (%s), so the images are decoded again", file, error)
        return None


def _write_cache(file: Path, key: str, train: Split, test: Split, classes: list[str]) -> None:
    arrays: dict[str, npt.ArrayLike] = dict(zip(_ARRAYS, (*train, *test, np.asarray(classes)), strict=True))
    partial = file.with_suffix(f".{os.getpid()}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as stream:
            np.savez(stream, allow_pickle=False, key=np.asarray(key), **arrays)
        partial.replace(file)
    except OSError as error:
        partial.unlink(missing_ok=True)
        logger.warning(
            "%s: the decoded images could not be cached (%s); the next start decodes them again", file, error
        )


def read_image_folder(folder: Path) -> tuple[Split, Split, list[str]]:
    """Both splits of a folder, from the cache where it is still true.

    Returns:
        The training and the test images with their labels, and the class names that the labels index.

    Raises:
        DataError: a folder or class that is missing or empty, one class only, classes that differ between the splits,
            or a file that is no image.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; check the path{OTHER_DATA}")
    missing = [split for split in ("train", "test") if not (folder / split).is_dir()]
    if missing:
        raise DataError(f"{folder}: has no {' and no '.join(f'{split}/' for split in missing)}; create it{OTHER_DATA}")
    try:
        file, key = _cache_file(folder), _content_key(folder)
    except OSError as error:  # a link that leads nowhere, a folder that may not be listed
        raise DataError(
            f"{error.filename}: cannot be read, {error.strerror}; replace or remove it{OTHER_DATA}"
        ) from error
    cached = _read_cache(file, key)
    if cached is not None:
        return cached
    train_images, train_labels, classes = _decode_split(folder / "train")
    test_images, test_labels, test_classes = _decode_split(folder / "test")
    if classes != test_classes:
        different = ", ".join(sorted(set(classes) ^ set(test_classes)))
        raise DataError(
            f"{folder}: train/ and test/ do not hold the same classes ({different}); add what is missing{OTHER_DATA}"
        )
    train, test = (train_images, train_labels), (test_images, test_labels)
    _write_cache(file, key, train, test, classes)
    return train, test, classes
