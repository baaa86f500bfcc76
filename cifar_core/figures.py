"""How this project's figures look: curves over epochs, comparisons, probabilities as bars.

Okabe and Ito's colours, which the colour-blind can tell apart; legible at half a page. Knows nothing of runs.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt

matplotlib.use("agg")  # no window, on machines without a screen too
from matplotlib import pyplot, style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator

from cifar_core.calibration import Bin

COLOURS = {
    "black": "#000000",
    "orange": "#D55E00",
    "blue": "#0072B2",
    "green": "#009E73",
    "purple": "#CC79A7",
    "sky": "#56B4E9",
    "grey": "#9A9A9A",
}
"""Of Okabe and Ito, Color Universal Design (2008); grey for what stands back."""

Series = list[float]
"""A value per epoch, from epoch 1."""

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
        label: for the legend.
        colour: any of matplotlib's.
        seeds: a series a seed, of one length.
        marked: for each seed the epoch to mark, or none.
    """

    label: str
    colour: str
    seeds: list[Series]
    marked: list[int] | None = None


def save(figure: Figure, file: Path) -> None:
    """Writes a PNG whose bytes depend on what is drawn and on the versions of the libraries alone."""
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150, metadata={"Software": None})
    pyplot.close(figure)


def _draw(axes: Axes, curve: Curve, line: str) -> None:
    values = np.asarray(curve.seeds)
    epochs = np.arange(1, values.shape[1] + 1)
    if len(values) > 1:
        axes.fill_between(epochs, values.min(0), values.max(0), color=curve.colour, alpha=0.18, linewidth=0)
    axes.plot(epochs, values.mean(0), line, color=curve.colour, linewidth=2, label=curve.label)


def _count_epochs(axes: Axes) -> None:
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MultipleLocator(5 if axes.get_xlim()[1] < 40 else 10))


def plot_curves(file: Path, title: str, label: str, curves: Sequence[Curve]) -> None:
    """Quantities over epochs: the mean over seeds as a line, their range as a band, marked epochs as points."""
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
        _count_epochs(axes)
        axes.legend()
        save(figure, file)


def plot_comparison(file: Path, panels: Sequence[tuple[str, Sequence[Curve]]]) -> None:
    """Several recipes in panels side by side, each panel a quantity over epochs; one legend for all."""
    with style.context(STYLE):
        figure, all_axes = pyplot.subplots(1, len(panels), figsize=(5.0 * len(panels), 4.0), layout="constrained")
        for axes, (title, curves) in zip(np.atleast_1d(all_axes), panels, strict=True):
            for curve, line in zip(curves, itertools.cycle(("-", "--", "-.", ":")), strict=False):
                _draw(axes, curve, line)
            axes.set(title=title, xlabel="epoch")
            _count_epochs(axes)
        handles, labels = np.atleast_1d(all_axes)[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
        save(figure, file)


def plot_reliability(file: Path, title: str, kinds: Sequence[tuple[str, str, Sequence[Bin]]]) -> None:
    """Accuracy over confidence, a line each, beside the diagonal on which probabilities mean what they say.

    Args:
        file: where to write.
        title: above.
        kinds: label, colour and bins of each line; the size of a point grows with its count.
    """
    with style.context(STYLE):
        figure, axes = pyplot.subplots(figsize=(5.0, 4.6), layout="constrained")
        axes.plot((0, 1), (0, 1), color=COLOURS["grey"], linestyle=":", label="perfect")
        for (label, colour, bins), line in zip(kinds, itertools.cycle(("-", "--", "-.")), strict=False):
            confidence, accuracy = [each.confidence for each in bins], [each.accuracy for each in bins]
            total = sum(each.count for each in bins)
            axes.plot(confidence, accuracy, line, color=colour, label=label)
            sizes = [8 + 400 * each.count / total for each in bins]
            axes.scatter(confidence, accuracy, sizes, color=colour, alpha=0.7)
        axes.set(title=title, xlabel="confidence: the greatest probability", ylabel="accuracy")
        axes.set(xlim=(0, 1), ylim=(0, 1.02))
        axes.legend(loc="upper left")
        save(figure, file)


def plot_probabilities(
    file: Path,
    images: npt.NDArray[np.uint8],
    labels: Sequence[int],
    probabilities: npt.NDArray[np.float32],
    classes: Sequence[str],
    model: str,
) -> None:
    """Images, each beside its probabilities in class order as bars and numbers, the greatest highlighted (figure 10).

    Args:
        file: where to write; it shows images of the data set.
        images: uint8 [N, 32, 32, 3].
        labels: the true classes, N.
        probabilities: float32 [N, classes].
        classes: names in the order of the probabilities.
        model: for the title.
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
