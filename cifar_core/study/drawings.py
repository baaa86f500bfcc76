"""The figures of a report: which runs and measurements each shows, and where it stands in the document."""

import hashlib
import math
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from cifar_core.data import Dataset
from cifar_core.device import CPU
from cifar_core.evaluate import choose_split
from cifar_core.predictors import Predictor, load_predictor, predict_all
from cifar_core.run_folder import default_folder
from cifar_core.study.figures import (
    COLOURS,
    Curve,
    Series,
    plot_comparison,
    plot_curves,
    plot_examples,
    plot_probabilities,
    plot_reliability,
)
from cifar_core.study.measurements import CALIBRATION, read_calibration
from cifar_core.study.runs import Row, Rows, Run

DROPOUT_FIGURE = "dropout-rates.png"
_DROPOUT_CURVES = (
    ("baseline", "no dropout", "black"),
    ("dropout-0.2", "p = 0.2", "blue"),
    ("dropout-0.5", "p = 0.5", "green"),
    ("dropout-0.8", "p = 0.8", "orange"),
)
_LONGEST_NAME = 200
"""The longest name of a recipe, in characters, that names of files contain as a whole."""
_EXAMPLES = 4
"""Number of images in figure 10."""

FigureNames = dict[str, tuple[str, str]]
"""File names of the plots of loss and accuracy, by recipe."""


def figure_names(row: Row) -> tuple[str, str]:
    """File names of a recipe's plots of loss and accuracy: by the study's numbers, or by the name of the recipe."""
    if row.published and row.published.figures:
        loss, accuracy = row.published.figures
        return f"figure-{loss:02d}.png", f"figure-{accuracy:02d}.png"
    name = re.sub(r"[^a-z0-9.]+", "-", row.name)
    if len(name) > _LONGEST_NAME:
        name = f"{name[:_LONGEST_NAME]}-{hashlib.sha256(row.name.encode()).hexdigest()[:8]}"
    return f"{name}-loss.png", f"{name}-accuracy.png"


def draw_curves(rows: Rows, folder: Path) -> FigureNames:
    """Draws loss and accuracy of each recipe."""
    names = {}
    for row in rows.values():
        loss_file, accuracy_file = names[row.name] = figure_names(row)
        best = [run.best["epoch"] for run in row.runs]
        seeds = f"mean and range of {len(row.runs)} seeds" if len(row.runs) > 1 else "one seed"
        for file, key, label, scale in (
            (loss_file, "loss", "cross-entropy", 1.0),
            (accuracy_file, "accuracy", "accuracy, %", 100.0),
        ):
            curves = (
                Curve("training", COLOURS["orange"], _series(row, f"train_{key}", scale)),
                Curve("validation", COLOURS["blue"], _series(row, f"validation_{key}", scale), marked=best),
            )
            plot_curves(folder / file, f"{row.name}: {key}, {seeds}", label, curves)
    return names


def draw_dropout_rates(rows: Rows, folder: Path) -> bool:
    """Draws the dropout rates in one figure. Returns False, and draws nothing, with runs of fewer than two rates."""
    available = [(rows[name], label, COLOURS[colour]) for name, label, colour in _DROPOUT_CURVES if name in rows]
    if len(available) < 2:
        return False
    panels = [
        (title, [Curve(label, colour, _series(row, key, scale)) for row, label, colour in available])
        for title, key, scale in (
            ("validation accuracy, %, mean and range over seeds", "validation_accuracy", 100.0),
            ("validation loss", "validation_loss", 1.0),
        )
    ]
    plot_comparison(folder / DROPOUT_FIGURE, panels)
    return True


def draw_reliability(folder: Path, fingerprint: str) -> str | None:
    """Draws the calibration that `measure_calibration` wrote. Returns the file name.

    Returns None, and draws nothing, if it wrote none, or that of other data than the runs were trained on.

    Args:
        folder: folder of the figures.
        fingerprint: fingerprint of the data of the runs.
    """
    measured = read_calibration(folder / CALIBRATION)
    if measured is None or measured.fingerprint != fingerprint:
        return None
    lines = [
        (f"{label}: error {100 * error:.2f} %", COLOURS[colour], bins)
        for label, colour, (error, bins) in (
            ("without calibration", "orange", measured.before),
            ("as exported", "blue", measured.exported),
        )
    ]
    plot_reliability(folder / "reliability.png", f"{measured.model}, {measured.images:,} test images", lines)
    return "reliability.png"


def draw_image_figures(runs: Iterable[Run], dataset: Dataset, folder: Path) -> list[Path]:
    """Draws figures 1 and 10, which show images, into a folder that git ignores. Returns the files.

    Figure 10 needs the weights of a run or an export that was trained on this data, and is left out without them.
    """
    files = [folder / "figure-01.png"]
    plot_examples(dataset, files[0])
    predictor = _predictor_of_figure_10(runs, dataset)
    if predictor is not None:
        images, _ = choose_split(predictor, dataset, "validation")
        chosen = np.random.RandomState(10).choice(len(images), min(_EXAMPLES, len(images)), replace=False)
        pixels = images.images[chosen].numpy()
        _, probabilities = predict_all(predictor, pixels)
        labels = images.labels[chosen].tolist()
        files.append(folder / "figure-10.png")
        plot_probabilities(files[1], pixels, labels, probabilities, dataset.classes, predictor.name)
    return files


def figure_block(rows: Rows, names: FigureNames, dropout_rates: bool, reliability: str | None, prefix: str) -> str:
    """The figures as Markdown, one line per recipe."""
    lines = []
    if dropout_rates:
        lines += [f"![validation accuracy and loss of all dropout rates]({prefix}/{DROPOUT_FIGURE})", ""]
    for row in rows.values():
        loss, accuracy = names[row.name]
        numbers = row.published.figures if row.published else None
        origin = f"Figures {numbers[0]} and {numbers[1]}" if numbers else "Not shown in the study"
        lines += [
            f"{origin}: {row.name}",
            "",
            f"![loss of {row.name}]({prefix}/{loss}) ![accuracy]({prefix}/{accuracy})",
            "",
        ]
    if reliability:
        lines += ["Calibration of the exported model", "", f"![reliability diagram]({prefix}/{reliability})"]
    return "\n".join(lines).rstrip()


def _series(row: Row, key: str, scale: float) -> list[Series]:
    # An epoch that was not validated leaves a gap in the line.
    return [[math.nan if line[key] is None else scale * line[key] for line in run.history] for run in row.runs]


def _predictor_of_figure_10(runs: Iterable[Run], dataset: Dataset) -> Predictor | None:
    """The best p = 0.2 run with weights, as in the study; otherwise the best run with weights, or the export.

    None if none of them was trained on this data.
    """
    fingerprint = dataset.fingerprint
    candidates = [run for run in runs if run.folder.best.exists() and run.data["fingerprint"] == fingerprint]
    candidates = [run for run in candidates if run.name == "dropout-0.2"] or candidates
    best = max(candidates, key=lambda run: float(run.best["validation_accuracy"]), default=None)
    if best is not None:
        return load_predictor(best.folder.path, CPU)
    exported = default_folder(dataset.kind, "exported") / "model.onnx"
    predictor = load_predictor(exported, CPU) if exported.exists() else None
    return predictor if predictor is not None and predictor.trained_on == fingerprint else None
