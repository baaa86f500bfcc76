"""Reading a data set into memory: the official CIFAR-10 archive, a folder of image files, or generated images."""

import argparse
import dataclasses
import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from cifar_core.data.errors import OTHER_DATA, DataError
from cifar_core.data.image_folder import left_out_lines, printable, read_image_folder
from cifar_core.data.stratify import Labelled
from cifar_core.data.synthetic import SYNTHETIC_CLASSES, synthetic_images

SYNTHETIC_SIZE = 1000
"""Number of generated training images unless another number is given."""
_SYNTHETIC_RANGE = (50, 1_000_000)
_OFFICIAL_ARCHIVE = "cifar-10-python.tar.gz"
_OFFICIAL_FOLDER = "cifar-10-batches-py"

Kind = Literal["cifar10", "folder", "synthetic"]


@dataclass(frozen=True)
class Images:
    """Images and labels of one set: uint8 [N, 32, 32, 3] and int64 [N]."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> "Images":
        """A copy on a device; the same tensors if they are on it already."""
        return Images(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Dataset:
    """A training set and a test set with the same classes.

    Attributes:
        kind: where the images come from: the official archive, a folder of image files, or a generator.
        name: name for tables and manifests; never a path.
        train: training images.
        test: test images.
        classes: class names; labels index this tuple.
        fingerprint: SHA-256 over class names, images and labels, in hexadecimal. Equal data has an equal fingerprint.
        remarks: lines for a summary: how a folder was split, and which files were left out and why.
    """

    kind: Kind
    name: str
    train: Images
    test: Images
    classes: tuple[str, ...]
    fingerprint: str
    remarks: tuple[str, ...] = ()


def load_dataset(data: str | None = None) -> Dataset:
    """Reads a data set into memory.

    Args:
        data: `cifar10` for the official archive, which is downloaded into `data/` if necessary; `synthetic` or
            `synthetic:N` for N generated training images; otherwise a folder that holds the official archive,
            train/<class>/* and test/<class>/*, or <class>/*, of which a fifth becomes the test set. None means the
            value of the environment variable CIFAR10_DATA, or `cifar10` if that is not set.

    Raises:
        DataError: The data is missing, cannot be downloaded, is incomplete, corrupt, or not in the expected form.
    """
    if data == "":
        raise DataError(f"--data is empty; leave it out, or name the data{OTHER_DATA}")
    data = data or os.environ.get("CIFAR10_DATA") or "cifar10"
    if data == "cifar10":
        return _load_official(Path("data"), download=True)
    kind, _, size = data.partition(":")
    if kind == "synthetic":
        return _load_synthetic(_synthetic_size(data, size))
    folder = Path(data)
    if (folder / _OFFICIAL_FOLDER).is_dir():
        return _load_official(folder, download=False)
    archive = folder / _OFFICIAL_ARCHIVE
    if archive.is_file():
        # torchvision unpacks an archive only if it is allowed to download one, and downloads one if this is damaged.
        _check_archive(archive)
        return _load_official(folder, download=True)
    return _load_folder(folder)


def add_data_argument(parser: argparse.ArgumentParser) -> None:
    """Adds the option --data, which is the same in every command."""
    parser.add_argument(
        "--data",
        metavar="cifar10|FOLDER|synthetic[:N]",
        help="data set to use: cifar10 is the official archive (downloaded into data/ if necessary), FOLDER holds "
        "train/<class>/* and test/<class>/*, or only <class>/*, of which a fifth becomes the test set; synthetic:N "
        "generates N training images "
        f"(N is {SYNTHETIC_SIZE:,} if left out); default: $CIFAR10_DATA if set, otherwise cifar10",
    )


def _dataset(kind: Kind, name: str, train: Labelled, test: Labelled, classes: Iterable[str]) -> Dataset:
    classes = tuple(classes)
    digest = hashlib.sha256("\0".join(classes).encode())
    for array in (*train, *test):
        digest.update(np.ascontiguousarray(array).data)
    sets = [Images(torch.from_numpy(images), torch.from_numpy(labels)) for images, labels in (train, test)]
    return Dataset(kind, name, sets[0], sets[1], classes, digest.hexdigest())


def _load_folder(folder: Path) -> Dataset:
    content = read_image_folder(folder)
    dataset = _dataset("folder", printable(folder.resolve().name), content.train, content.test, content.classes)
    left_out = (f"left out: {line}" for line in left_out_lines(content.left_out))
    return dataclasses.replace(dataset, remarks=(*content.notes, *left_out))


def _check_archive(file: Path) -> None:
    """Checks that a file is the official archive.

    Raises:
        DataError: It has another MD5.
    """
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_md5

    if not check_md5(str(file), CIFAR10.tgz_md5):
        raise DataError(
            f"{file}: this is not the official archive, or a damaged one (its MD5 is not {CIFAR10.tgz_md5}); replace "
            f"it{OTHER_DATA}"
        )


def _load_official(root: Path, download: bool) -> Dataset:
    """Reads the official archive with torchvision, which checks the MD5 of every file before opening it."""
    from torchvision.datasets import CIFAR10

    try:
        train = CIFAR10(str(root), train=True, download=download)
        test = CIFAR10(str(root), train=False)
    except (RuntimeError, OSError) as error:  # torchvision raises RuntimeError; URLError is an OSError
        raise DataError(
            f"{root}: the official CIFAR-10 archive is missing, incomplete or corrupt, and could not be downloaded "
            f"({error}); with a network connection, remove {root} and try again; without one, copy "
            f"{_OFFICIAL_ARCHIVE} into it{OTHER_DATA}"
        ) from error
    arrays = [(part.data, np.asarray(part.targets, np.int64)) for part in (train, test)]
    return _dataset("cifar10", "CIFAR-10, official archive", arrays[0], arrays[1], train.classes)


def _synthetic_size(data: str, size: str) -> int:
    lowest, highest = _SYNTHETIC_RANGE
    # Python converts no number of more than 4,300 digits.
    if size and not (size.isdecimal() and len(size) <= len(str(highest)) and lowest <= int(size) <= highest):
        raise DataError(
            f"--data {data}: the number of synthetic images must be {lowest:,} to {highest:,}, as in synthetic:1500"
        )
    return int(size or SYNTHETIC_SIZE)


def _load_synthetic(size: int) -> Dataset:
    test_size = max(size // 3, len(SYNTHETIC_CLASSES))
    train, test = synthetic_images(size, seed=0), synthetic_images(test_size, seed=1)
    return _dataset("synthetic", f"synthetic, {size} images", train, test, SYNTHETIC_CLASSES)
