"""A folder of image files -> uint8 arrays, decoded once and cached.

The folder holds `train/<class>/*` and `test/<class>/*`, as `torchvision.datasets.ImageFolder` reads them. Files are
decoded by `cifar_core.images`, the decoder of the server, so that a model sees the same pixels in both.
"""

import contextlib
import hashlib
import logging
import os
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from cifar_core.data.errors import OTHER_DATA, DataError
from cifar_core.images import DECODER_VERSION, EXTENSIONS, IMAGE_SIZE, ImageRejected, decode

logger = logging.getLogger(__name__)

_CACHE_VERSION = 2
"""Version of the layout of the cache; the decoder has a version of its own."""
_SPLITS = ("train", "test")
_ARRAYS = ("train_images", "train_labels", "test_images", "test_labels", "classes")

Split = tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]
"""Images, uint8 [N, 32, 32, 3], and their labels, int64 [N]."""


def read_image_folder(folder: Path) -> tuple[Split, Split, list[str]]:
    """Reads both splits of a folder, from the cache if the folder has not changed since it was written.

    Files whose extension is not in `images.EXTENSIONS` are left out; a warning in the log counts them.

    Returns:
        The training set, the test set, and the class names that the labels index.

    Raises:
        DataError: A folder or class is missing or empty, there is only one class, the splits have different classes,
            or a file cannot be decoded.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: this folder does not exist; check the path{OTHER_DATA}")
    missing = [split for split in _SPLITS if not (folder / split).is_dir()]
    if missing:
        raise DataError(f"{folder}: there is no {' and no '.join(f'{name}/' for name in missing)}; add it{OTHER_DATA}")
    try:
        file, key = _cache_file(folder), _content_key(folder)
    except OSError as error:  # for example a broken link, or a folder without read permission
        raise DataError(
            f"{error.filename}: this file cannot be read ({error.strerror}); replace or remove it{OTHER_DATA}"
        ) from error
    cached = _read_cache(file, key)
    if cached is not None:
        return cached
    train_images, train_labels, classes = _decode_split(folder / "train")
    test_images, test_labels, test_classes = _decode_split(folder / "test")
    if classes != test_classes:
        different = ", ".join(sorted(set(classes) ^ set(test_classes)))
        raise DataError(
            f"{folder}: train/ and test/ must have the same classes, but only one of them has: {different}; add the "
            f"missing class folders{OTHER_DATA}"
        )
    train, test = (train_images, train_labels), (test_images, test_labels)
    _write_cache(file, key, train, test, classes)
    return train, test, classes


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS)


def _decode_file(path: str) -> npt.NDArray[np.uint8]:
    """The pixels of one file, uint8 [32, 32, 3]."""
    try:
        return decode(Path(path).read_bytes())
    except ImageRejected as error:
        raise DataError(f"{path}: this file cannot be decoded ({error}); replace or remove it{OTHER_DATA}") from error
    except OSError as error:
        raise DataError(
            f"{path}: this file cannot be read ({error.strerror}); replace or remove it{OTHER_DATA}"
        ) from error


def _decode_split(folder: Path) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64], list[str]]:
    """Decodes all images of `<folder>/<class>/*`, in the order of class and file name."""
    import torchvision

    try:
        listing = torchvision.datasets.ImageFolder(folder, is_valid_file=_is_image)
    except FileNotFoundError as error:  # there is no class, or a class has no image
        raise DataError(
            f"{folder}: {error} (extensions of image files: {' '.join(EXTENSIONS)}); add images or remove the empty "
            f"class{OTHER_DATA}"
        ) from error
    if len(listing.classes) < 2:
        raise DataError(
            f"{folder}: there is only one class ({listing.classes[0]}); at least 2 are needed; add one{OTHER_DATA}"
        )
    images = np.empty((len(listing.samples), IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    # disable=None: no progress bar unless the output is a terminal
    progress = tqdm(listing.samples, desc=f"decoding {folder.name}", unit="image", disable=None)
    for row, (path, _) in enumerate(progress):
        images[row] = _decode_file(path)
    return images, np.asarray(listing.targets, np.int64), listing.classes


def _files(folder: Path) -> Iterator[tuple[str, str]]:
    """Folder and name of every file below <split>/<class>/, at any depth, as torchvision's ImageFolder finds them."""
    for split in _SPLITS:
        for directory in sorted(os.scandir(folder / split), key=lambda entry: entry.name):
            if directory.is_dir():
                for path, _, names in sorted(os.walk(directory.path, followlinks=True)):
                    yield from ((path, name) for name in sorted(names))


def _content_key(folder: Path) -> str:
    """A key that changes when an image below train/ or test/ is added, removed, renamed or written.

    It is computed from names, sizes and times: reading 60,000 files would delay every start. The change time (ctime) is
    included because, unlike the modification time, no program can set it. Counts the files left out on the way.
    """
    digest = hashlib.sha256(f"cache {_CACHE_VERSION}, decoder {DECODER_VERSION}\n".encode())
    for split in _SPLITS:
        classes = sorted(entry.name for entry in os.scandir(folder / split) if entry.is_dir())
        digest.update(f"{split}: {classes}\n".encode())
    left_out: Counter[str] = Counter()
    for path, name in _files(folder):
        if not _is_image(name):
            left_out[os.path.splitext(name)[1].lower() or "without extension"] += 1  # noqa: PTH122
            continue
        status = os.stat(f"{path}/{name}")  # noqa: PTH116 (three times as fast as pathlib)
        digest.update(f"{path}/{name}\0{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}\n".encode())
    if left_out:
        counts = ", ".join(f"{extension}: {count:,}" for extension, count in sorted(left_out.items()))
        logger.warning(
            "%s: %s files were left out because of their extension (%s); extensions of image files: %s",
            folder, f"{left_out.total():,}", counts, " ".join(EXTENSIONS),
        )  # fmt: skip
    return digest.hexdigest()


def _cache_file(folder: Path) -> Path:
    """The cache of a folder: one file, so that earlier states of the folder do not accumulate."""
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
        logger.warning("%s: this cache cannot be read (%s); the images are decoded again", file, error)
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
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        logger.warning(
            "%s: the decoded images could not be cached (%s); they will be decoded again at the next start", file, error
        )
