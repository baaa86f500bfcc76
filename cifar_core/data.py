"""CIFAR-10 and its stand-ins as uint8 tensors in memory; the split, the samplers, batches, statistics and figure 1.

`python -m cifar_core.data` prints a summary of the data, verifies the study's constants and writes figure 1. Knows
nothing of models or training.
"""

import argparse
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler, SubsetRandomSampler, WeightedRandomSampler

from cifar_core.errors import run_command
from cifar_core.image_folder import OTHER_DATA, DataError, Split, read_image_folder
from cifar_core.synthetic import SYNTHETIC_CLASSES, synthetic_images

PUBLISHED_MEANS = (0.49139967861519607, 0.48215840839460783, 0.44653091444546567)
PUBLISHED_STDS = (0.2470322324632819, 0.24348512800005573, 0.26158784172796434)
"""Per channel, over every pixel of the official training images, divided by 255: the study's section 1.1.3."""

SYNTHETIC_SIZE = 1000
_OFFICIAL_ARCHIVE = "cifar-10-python.tar.gz"


@dataclass(frozen=True)
class Images:
    """Images and labels of one set: uint8 [N, 32, 32, 3] and int64 [N]."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> "Images":
        """The same on a device."""
        return Images(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Dataset:
    """A training and a test set over the same classes.

    Attributes:
        kind: where it comes from: the official archive, a folder of image files, or generated.
        name: for tables and manifests; never a path.
        fingerprint: SHA-256 over class names, images and labels, in hexadecimal: the same data, the same fingerprint.
    """

    kind: Literal["cifar10", "folder", "synthetic"]
    name: str
    train: Images
    test: Images
    classes: tuple[str, ...]
    fingerprint: str


def _dataset(
    kind: Literal["cifar10", "folder", "synthetic"], name: str, train: Split, test: Split, classes: Iterable[str]
) -> Dataset:
    classes = tuple(classes)
    digest = hashlib.sha256("\0".join(classes).encode())
    for array in (*train, *test):
        digest.update(np.ascontiguousarray(array).data)
    sets = [Images(torch.from_numpy(images), torch.from_numpy(labels)) for images, labels in (train, test)]
    return Dataset(kind, name, sets[0], sets[1], classes, digest.hexdigest())


def _load_official(root: Path, download: bool) -> Dataset:
    """The official archive through torchvision, which checks every file's md5 before it is opened."""
    from torchvision.datasets import CIFAR10

    try:
        train = CIFAR10(str(root), train=True, download=download)
        test = CIFAR10(str(root), train=False)
    except (RuntimeError, OSError) as error:  # torchvision's own refusals; URLError is an OSError
        raise DataError(
            f"{root}: the official CIFAR-10 is not there, incomplete or corrupt, and could not be downloaded "
            f"({error}); "
            "with a network, remove what is there and try again; without one, put "
            f"{_OFFICIAL_ARCHIVE} there{OTHER_DATA}"
        ) from error
    arrays = [(part.data, np.asarray(part.targets, np.int64)) for part in (train, test)]
    return _dataset("cifar10", "CIFAR-10, official archive", arrays[0], arrays[1], train.classes)


def _load_synthetic(size: int) -> Dataset:
    test_size = max(size // 3, len(SYNTHETIC_CLASSES))
    train, test = synthetic_images(size, seed=0), synthetic_images(test_size, seed=1)
    return _dataset("synthetic", f"synthetic, {size} images", train, test, SYNTHETIC_CLASSES)


def load_dataset(data: str | None = None) -> Dataset:
    """Reads a data set into memory.

    Args:
        data: `cifar10`: the official archive, downloaded into `data/` if need be. `synthetic`, or `synthetic:N` for N
            training images: generated. Otherwise a folder: of the official archive, or of train/<class>/* and
            test/<class>/*. None: the environment variable CIFAR10_DATA, or `cifar10` without it.

    Raises:
        DataError: not there, not downloadable, incomplete, corrupt, or of the wrong form.
    """
    data = data or os.environ.get("CIFAR10_DATA") or "cifar10"
    if data == "cifar10":
        return _load_official(Path("data"), download=True)
    kind, _, size = data.partition(":")
    if kind == "synthetic":
        if size and not (size.isdecimal() and 50 <= int(size) <= 1_000_000):
            raise DataError(
                f"--data {data}: the number of synthetic images must be 50 to 1,000,000, as in synthetic:1500"
            )
        return _load_synthetic(int(size or SYNTHETIC_SIZE))
    folder = Path(data)
    if (folder / "cifar-10-batches-py").is_dir() or (folder / _OFFICIAL_ARCHIVE).is_file():
        # torchvision unpacks an archive that lies there only when asked to download.
        return _load_official(folder, download=not (folder / "cifar-10-batches-py").is_dir())
    return _dataset("folder", folder.resolve().name, *read_image_folder(folder))


def split(count: int, validation_images: int = 1000, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Splits the training images into those to train on and those held out; 49,000 and 1,000 for CIFAR-10.

    Args:
        count: number of training images, at least 20.
        validation_images: to be held out, but at most a tenth of `count`, so that small data sets train too.
        seed: decides which; the same on every machine and in every version of every library.

    Returns:
        Indices of the training and of the validation images, int64, each sorted.

    Raises:
        DataError: fewer than 20 images.
    """
    if count < 20:
        raise DataError(f"{count} training images cannot be split, at least 20 are needed; add images{OTHER_DATA}")
    # numpy has promised never to change this stream (NEP 19), which neither torch nor numpy's Generator does.
    order = np.random.RandomState(seed).permutation(count).astype(np.int64)
    held_out = min(validation_images, count // 10)
    return torch.from_numpy(np.sort(order[held_out:])), torch.from_numpy(np.sort(order[:held_out]))


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """A generator for one epoch's order.

    The order depends on seed and epoch alone, so that a resumed run draws the same batches as one never interrupted.
    """
    state = np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) % 2**63)


def weighted_sampler(indices: Tensor, count: int, generator: torch.Generator) -> WeightedRandomSampler:
    """The first of the study's loaders: each of `indices` once, in random order, by equal weights without replacement.

    Args:
        indices: int64, the images to be drawn; all others of the `count` images have weight 0.
        count: number of images in the set that `indices` index.
        generator: of the order.
    """
    weights = torch.zeros(count, dtype=torch.float64)
    weights[indices] = 1.0
    # The annotations of torch ask for a list, the code for anything that as_tensor takes.
    return WeightedRandomSampler(weights, len(indices), replacement=False, generator=generator)  # type: ignore[arg-type]


def subset_sampler(indices: Tensor, generator: torch.Generator) -> SubsetRandomSampler:
    """The second of the study's loaders: each of `indices` once, in random order."""
    return SubsetRandomSampler(indices.tolist(), generator=generator)


class Batches:
    """A data loader over images in memory: one gather a batch, on the device where the images are.

    Yields images uint8 [B, 32, 32, 3] and labels int64 [B] in the sampler's order; the last batch may be smaller.

    Args:
        data: the images; on any device.
        order: indices into them, a sampler of torch or an int64 tensor.
        batch_size: at least 1.
        start: number of batches to leave out, for a run that goes on within an epoch.
        augment: gives the images of some indices (int64 [B]) in place of the plain ones.
    """

    def __init__(
        self,
        data: Images,
        order: Sampler[int] | Tensor,
        batch_size: int,
        start: int = 0,
        augment: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, but must be at least 1")
        self.data = data
        self.order = order
        self.batch_size = batch_size
        self.start = start
        self.augment = augment or data.images.__getitem__

    def __len__(self) -> int:
        return -(-len(self.order) // self.batch_size) - self.start  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = self.order if isinstance(self.order, Tensor) else torch.tensor(list(self.order))
        order = order.to(self.data.labels.device)
        for first in range(self.start * self.batch_size, len(order), self.batch_size):
            indices = order[first : first + self.batch_size]
            yield self.augment(indices), self.data.labels[indices]


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Means and standard deviations of each channel over every pixel, of values scaled to [0, 1].

    Args:
        images: uint8 [N, H, W, C].

    Returns:
        Means and (population) standard deviations, C of each. Exact but for one rounding: computed from the counts of
        the 256 values, not by adding up 50 million floats.
    """
    values = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in range(images.shape[-1]):
        shares = torch.bincount(images[..., channel].flatten(), minlength=256).double()
        shares /= shares.sum()
        mean = (shares * values).sum()
        means.append(float(mean))
        stds.append(float((shares * (values - mean) ** 2).sum().sqrt()))
    return tuple(means), tuple(stds)


def summary(dataset: Dataset) -> str:
    """Sizes and classes of both sets, and the statistics of the training images beside the published ones, as text."""
    lines = [f"{dataset.name} (fingerprint {dataset.fingerprint[:12]})"]
    training, validation = split(len(dataset.train))
    for name, part in (("train", dataset.train), ("test", dataset.test)):
        counts = torch.bincount(part.labels, minlength=len(dataset.classes)).tolist()
        each = f"{min(counts):,}" if min(counts) == max(counts) else f"{min(counts):,} to {max(counts):,}"
        lines.append(f"  {name:5s} {len(part):6,} images of {tuple(part.images.shape[1:])}, uint8; {each} a class")
    lines.append(f"  split {len(training):6,} to train on, {len(validation):,} for validation")
    lines.append(f"  classes: {', '.join(dataset.classes)}")
    means, stds = channel_statistics(dataset.train.images)
    lines.append("  channel     mean      published   difference   std       published   difference")
    for row, channel in enumerate(("red", "green", "blue")):
        columns = ((means[row], PUBLISHED_MEANS[row]), (stds[row], PUBLISHED_STDS[row]))
        lines.append(
            f"  {channel:9s}"
            + " ".join(f"  {ours:.6f}  {theirs:.6f}   {ours - theirs:+.1e}  " for ours, theirs in columns)
        )
    return "\n".join(lines)


def plot_examples(dataset: Dataset, file: Path, seed: int = 0) -> None:
    """Figure 1: four random training images with their labels. Shows images, so it belongs into an ignored folder."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    rows = np.random.RandomState(seed).choice(len(dataset.train), 4, replace=False)
    figure, axes = pyplot.subplots(1, 4, figsize=(8, 2.4), layout="constrained")
    for axis, row in zip(axes, rows, strict=True):
        axis.imshow(dataset.train.images[row].numpy())  # channels last already, as plotting wants it
        axis.set_title(dataset.classes[int(dataset.train.labels[row])], fontsize=11)
        axis.axis("off")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def add_data_argument(parser: argparse.ArgumentParser) -> None:
    """The option --data, the same in every command."""
    parser.add_argument(
        "--data",
        metavar="cifar10|FOLDER|synthetic[:N]",
        help="the official archive (downloaded into data/), a folder with train/<class>/* and test/<class>/*, or N "
        f"generated images ({SYNTHETIC_SIZE:,} unless said); default: $CIFAR10_DATA, or cifar10",
    )


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m cifar_core.data", description="Summary, statistics and figure 1.")
    add_data_argument(parser)
    parser.add_argument("--figure", type=Path, default=Path("reports/figure-01.png"), help="default: %(default)s")
    arguments = parser.parse_args()
    dataset = load_dataset(arguments.data)
    print(summary(dataset))
    plot_examples(dataset, arguments.figure)
    print(f"figure 1: {arguments.figure}")
    return 0


if __name__ == "__main__":
    run_command(main)
