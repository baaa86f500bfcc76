"""The figures: curves over epochs, comparisons, reliability diagrams, and images with their labels or probabilities.

The colours are those of Okabe and Ito, which colour-blind readers can tell apart. This module must not depend on runs.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt

matplotlib.use("agg")  # draws into files, also on machines without a display
from matplotlib import pyplot, style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator

from cifar_core.calibration import Bin
from cifar_core.data import Dataset

COLOURS = {
    "black": "#000000",
    "orange": "#D55E00",
    "blue": "#0072B2",
    "green": "#009E73",
    "purple": "#CC79A7",
    "sky": "#56B4E9",
    "grey": "#9A9A9A",
}
"""From Okabe and Ito, Color Universal Design (2008); grey is for elements in the background."""

Series = list[float]
"""One value per epoch, beginning with epoch 1."""

STYLE: dict[str, Any] = {
    "font.size": 12,
    "axes.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Curve:
    """A quantity over epochs for several seeds.

    Attributes:
        label: text in the legend.
        colour: any colour of matplotlib.
        seeds: one series per seed, all of the same length.
        marked: the epoch to mark in the series of each seed; None to mark none.
    """

    label: str
    colour: str
    seeds: list[Series]
    marked: list[int] | None = None


def save(figure: Figure, file: Path) -> None:
    """Writes a PNG whose bytes depend only on the drawing and on library versions."""
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, format="png", dpi=150, metadata={"Software": None})
    pyplot.close(figure)


def _draw(axes: Axes, curve: Curve, line: str) -> None:
    values = np.asarray(curve.seeds)
    epochs = np.arange(1, values.shape[1] + 1)
    if len(values) > 1:
        axes.fill_between(epochs, values.min(0), values.max(0), color=curve.colour, alpha=0.18, linewidth=0)
    axes.plot(epochs, values.mean(0), line, color=curve.colour, linewidth=2, label=curve.label)


def _set_epoch_axis(axes: Axes) -> None:
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MultipleLocator(5 if axes.get_xlim()[1] < 40 else 10))


def plot_curves(file: Path, title: str, label: str, curves: Sequence[Curve]) -> None:
    """Draws quantities over epochs: the mean over seeds as a line, their range as a band, marked epochs as points."""
    with style.context(STYLE):
        figure, axes = pyplot.subplots(figsize=(6.0, 4.0), layout="constrained")
        for curve, line in zip(curves, itertools.cycle(("--", "-", "-.", ":")), strict=False):
            _draw(axes, curve, line)
            if curve.marked:
                axes.plot(
                    curve.marked,
                    [series[epoch - 1] for series, epoch in zip(curve.seeds, curve.marked, strict=True)],
                    "o",
                    color=curve.colour,
                    markeredgecolor="white",
                    markersize=8,
                    label="best validation accuracy" + (", each seed" if len(curve.marked) > 1 else ""),
                )
        axes.set(title=title, xlabel="epoch", ylabel=label)
        _set_epoch_axis(axes)
        axes.legend()
        save(figure, file)


def plot_comparison(file: Path, panels: Sequence[tuple[str, Sequence[Curve]]]) -> None:
    """Draws several recipes in panels side by side, one quantity over epochs per panel, with one legend for all.

    Args:
        file: the PNG to write.
        panels: title and curves of each panel.
    """
    with style.context(STYLE):
        figure, all_axes = pyplot.subplots(1, len(panels), figsize=(5.0 * len(panels), 4.0), layout="constrained")
        for axes, (title, curves) in zip(np.atleast_1d(all_axes), panels, strict=True):
            for curve, line in zip(curves, itertools.cycle(("-", "--", "-.", ":")), strict=False):
                _draw(axes, curve, line)
            axes.set(title=title, xlabel="epoch")
            _set_epoch_axis(axes)
        handles, labels = np.atleast_1d(all_axes)[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
        save(figure, file)


def plot_reliability(file: Path, title: str, lines: Sequence[tuple[str, str, Sequence[Bin]]]) -> None:
    """Draws accuracy over confidence, with the diagonal of perfect calibration.

    Args:
        file: the PNG to write.
        title: title of the figure.
        lines: label, colour and bins of each line. The area of a point grows with the count of its bin.
    """
    with style.context(STYLE):
        figure, axes = pyplot.subplots(figsize=(5.0, 4.6), layout="constrained")
        axes.plot((0, 1), (0, 1), color=COLOURS["grey"], linestyle=":", label="perfect")
        for (label, colour, bins), line in zip(lines, itertools.cycle(("-", "--", "-.")), strict=False):
            confidence, accuracy = [group.confidence for group in bins], [group.accuracy for group in bins]
            total = sum(group.count for group in bins)
            axes.plot(confidence, accuracy, line, color=colour, label=label)
            sizes = [8 + 400 * group.count / total for group in bins]
            axes.scatter(confidence, accuracy, sizes, color=colour, alpha=0.7)
        axes.set(title=title, xlabel="confidence: the greatest probability", ylabel="accuracy")
        axes.set(xlim=(0, 1), ylim=(0, 1.02))
        axes.legend(loc="upper left")
        save(figure, file)


def plot_examples(dataset: Dataset, file: Path, seed: int = 0) -> None:
    """Draws figure 1: four random training images with their labels. It shows images, so git must ignore the file."""
    rows = np.random.RandomState(seed).choice(len(dataset.train), min(4, len(dataset.train)), replace=False)
    figure, axes = pyplot.subplots(1, len(rows), figsize=(2 * len(rows), 2.4), layout="constrained", squeeze=False)
    for axis, row in zip(axes[0], rows, strict=True):
        axis.imshow(dataset.train.images[row].numpy())
        axis.set_title(dataset.classes[int(dataset.train.labels[row])], fontsize=11)
        axis.axis("off")
    save(figure, file)


def plot_probabilities(
    file: Path,
    images: npt.NDArray[np.uint8],
    labels: Sequence[int],
    probabilities: npt.NDArray[np.float32],
    classes: Sequence[str],
    model: str,
) -> None:
    """Draws figure 10: images, each next to its probabilities in class order, with the greatest one highlighted.

    Args:
        file: the PNG to write. It shows images, so git must ignore it.
        images: uint8 [N, 32, 32, 3].
        labels: the true classes, N.
        probabilities: float32 [N, classes].
        classes: class names, in the order of the probabilities.
        model: name of the model, for the title.
    """
    with style.context([STYLE, {"axes.grid": False}]):
        figure, grid = pyplot.subplots(
            len(images), 2, figsize=(7.0, 2.9 * len(images)), width_ratios=(1, 2.2), layout="constrained"
        )
        for (left, right), image, label, row in zip(np.atleast_2d(grid), images, labels, probabilities, strict=True):
            left.imshow(image)
            left.set_title(f"true class: {classes[label]}")
            left.axis("off")
            colours = [COLOURS["orange"] if index == row.argmax() else COLOURS["grey"] for index in range(len(row))]
            bars = right.barh(classes, row, color=colours)
            right.bar_label(bars, labels=[f"{value:.3f}" for value in row], padding=4, fontsize=10)
            right.set(xlim=(0, 1.12), xticks=(0, 0.5, 1))
            right.invert_yaxis()
        figure.suptitle(f"probabilities of {model}", fontsize=12)
        save(figure, file)
