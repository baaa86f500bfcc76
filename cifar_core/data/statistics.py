"""Channel statistics of a data set next to the published ones, and a summary as text."""

import torch
from torch import Tensor

from cifar_core.data.datasets import Dataset
from cifar_core.data.sampling import split

PUBLISHED_MEANS = (0.49139967861519607, 0.48215840839460783, 0.44653091444546567)
PUBLISHED_STDS = (0.2470322324632819, 0.24348512800005573, 0.26158784172796434)
"""Per channel, over every pixel of the official training images, divided by 255 (section 1.1.3 of the study)."""


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel over every pixel, with values scaled to [0, 1].

    Args:
        images: uint8 [N, H, W, C].

    Returns:
        C means and C population standard deviations. They are computed from the frequencies of the 256 values, which
        is exact up to rounding, and not by summing 50 million floats.
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


def class_lines(dataset: Dataset) -> list[str]:
    """The classes, with the numbers of their training and test images; and the remarks on a folder."""
    train, test = (
        torch.bincount(part.labels, minlength=len(dataset.classes)) for part in (dataset.train, dataset.test)
    )
    if len(set(train.tolist())) == len(set(test.tolist())) == 1:
        lines = [f"  classes: {', '.join(dataset.classes)} ({train[0]:,} + {test[0]:,} images each)"]
    else:
        counts = zip(dataset.classes, train.tolist(), test.tolist(), strict=True)
        lines = ["  classes: " + ", ".join(f"{name} ({first:,} + {second:,})" for name, first, second in counts)]
    return lines + [f"  {remark}" for remark in dataset.remarks]


def summary(dataset: Dataset) -> str:
    """Sizes and classes of both sets, and the statistics of the training images next to the published ones, as text."""
    lines = [f"{dataset.name} (fingerprint {dataset.fingerprint[:12]})"]
    train_indices, validation_indices = split(len(dataset.train))
    for name, part in (("train", dataset.train), ("test", dataset.test)):
        counts = torch.bincount(part.labels, minlength=len(dataset.classes)).tolist()
        lowest, highest = min(counts), max(counts)
        per_class = f"{lowest:,}" if lowest == highest else f"{lowest:,} to {highest:,}"
        lines.append(
            f"  {name:5s} {len(part):6,} images of {tuple(part.images.shape[1:])}, uint8; {per_class} per class"
        )
    lines.append(f"  split {len(train_indices):6,} to train on, {len(validation_indices):,} for validation")
    lines += class_lines(dataset)
    means, stds = channel_statistics(dataset.train.images)
    lines.append("  channel     mean      published   difference   std       published   difference")
    for row, channel in enumerate(("red", "green", "blue")):
        columns = ((means[row], PUBLISHED_MEANS[row]), (stds[row], PUBLISHED_STDS[row]))
        lines.append(
            f"  {channel:9s}"
            + " ".join(f"  {ours:.6f}  {published:.6f}   {ours - published:+.1e}  " for ours, published in columns)
        )
    return "\n".join(lines)
