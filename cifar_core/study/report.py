"""Writes the report on finished runs: the study's table next to ours, its claims, and its figures.

    python -m cifar_core.report [--runs runs --output reports]

It reads run folders, or the committed histories of runs, and trains nothing. Figures 1 and 10 show images of the data
set; they are written to `reports/`, which git ignores.
"""

import argparse
import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from cifar_core.calibration import Bin
from cifar_core.data import Dataset, add_data_argument, load_dataset
from cifar_core.device import CPU
from cifar_core.evaluate import check_classes, choose_split, evaluate
from cifar_core.files import atomic_write, to_json
from cifar_core.predictors import load_predictor, predict_all
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
from cifar_core.study.runs import ReportError, Row, Rows, Run, evaluation_file, main_rows, read_runs, rows_of
from cifar_core.study.tables import claim_table, class_table, precision_table, study_table

HISTORIES = Path("docs/results/histories")
"""The committed histories of the published report."""
CALIBRATION = "calibration.json"
IMAGE_FIGURES = Path("reports")
"""Folder for figures that show images; git ignores it."""
DROPOUT_FIGURE = "dropout-rates.png"
_DROPOUT_CURVES = (
    ("baseline", "no dropout", "black"),
    ("dropout-0.2", "p = 0.2", "blue"),
    ("dropout-0.5", "p = 0.5", "green"),
    ("dropout-0.8", "p = 0.8", "orange"),
)

FigureNames = dict[str, tuple[str, str]]
"""File names of the plots of loss and accuracy, by recipe."""


# Measurements that the report needs


def evaluate_runs(runs: Iterable[Run], dataset: Dataset) -> None:
    """Evaluates the best weights of each run on the test images, once, and keeps the result in the run folder.

    Runs without weights, such as the committed histories, and runs of other data are left unchanged.
    """
    keys = ("model", "data", "split", "images", "correct", "accuracy", "interval", "loss", "per_class")
    for run in runs:
        if run.test is None and run.folder.best.exists() and run.data["fingerprint"] == dataset.fingerprint:
            result = evaluate(load_predictor(run.folder.path, CPU), dataset, "test")
            atomic_write(evaluation_file(run.folder), to_json({key: result[key] for key in keys}))


def measure_calibration(exported: Path, dataset: Dataset, file: Path) -> None:
    """Writes the calibration of an exported graph on the test images, unless the file holds that of this graph.

    Does nothing if the model was trained on other data.
    """
    predictor = load_predictor(exported, CPU)
    digest = hashlib.sha256(exported.read_bytes()).hexdigest()  # a new calibration keeps the version of the model
    measured = json.loads(file.read_bytes()).get("sha256") if file.exists() else None
    if predictor.trained_on == dataset.fingerprint and measured != digest:
        result = evaluate(predictor, dataset, "test")
        keys = ("model", "data", "images", "accuracy", "loss", "calibration")
        atomic_write(file, to_json({"sha256": digest} | {key: result[key] for key in keys}))


def copy_histories(runs: Iterable[Run], target: Path) -> None:
    """Copies what a report needs of each run, a few kilobytes, to TARGET/PRECISION/RECIPE/SEED."""
    for run in runs:
        folder = target / run.precision / run.recipe.name / str(run.seed)
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("recipe.json", "history.jsonl", "test.json"):
            if (run.folder.path / name).exists():
                atomic_write(folder / name, (run.folder.path / name).read_bytes())


# Figures


def figure_names(row: Row) -> tuple[str, str]:
    """File names of a recipe's plots of loss and accuracy: by the study's numbers, or by the name of the recipe."""
    if row.published and row.published.figures:
        loss, accuracy = row.published.figures
        return f"figure-{loss:02d}.png", f"figure-{accuracy:02d}.png"
    name = re.sub(r"[^a-z0-9.]+", "-", row.name)
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


def draw_reliability(folder: Path) -> str | None:
    """Draws the calibration that `measure_calibration` wrote. Returns the file name; None if it wrote none."""
    if not (folder / CALIBRATION).exists():
        return None
    measured = json.loads((folder / CALIBRATION).read_bytes())
    calibration = measured["calibration"]
    lines = [
        (
            f"{label}: error {100 * calibration[ece]:.2f} %",
            COLOURS[colour],
            [Bin(**group) for group in calibration[bins]],
        )
        for label, colour, ece, bins in (
            ("without calibration", "orange", "ece_before", "bins_before"),
            ("as exported", "blue", "ece", "bins"),
        )
    ]
    plot_reliability(folder / "reliability.png", f"{measured['model']}, {measured['images']:,} test images", lines)
    return "reliability.png"


def draw_image_figures(runs: Iterable[Run], dataset: Dataset, folder: Path) -> list[Path]:
    """Draws figures 1 and 10, which show images, into a folder that git ignores. Returns the files.

    Figure 10 needs the weights of a run or an export, and is left out without them.
    """
    files = [folder / "figure-01.png"]
    plot_examples(dataset, files[0])
    model = _model_of_figure_10(runs, default_folder(dataset.kind, "exported") / "model.onnx")
    if model is not None:
        predictor = load_predictor(model, CPU)
        check_classes(predictor, dataset)
        images, _ = choose_split(predictor, dataset, "validation")
        chosen = np.random.RandomState(10).choice(len(images), 4, replace=False)
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


def _model_of_figure_10(runs: Iterable[Run], exported: Path) -> Path | None:
    """The best p = 0.2 run with weights, as in the study; otherwise the best run with weights, or the export."""
    candidates = [run for run in runs if run.folder.best.exists()]
    candidates = [run for run in candidates if run.recipe.name == "dropout-0.2"] or candidates
    best = max(candidates, key=lambda run: float(run.best["validation_accuracy"]), default=None)
    if best is None:
        return exported if exported.exists() else None
    return best.folder.path


# The document

NEW_DOCUMENT = """# Results

Published results next to our own. `make report` writes every block between markers.

## The study, row by row

<!-- begin table -->
<!-- end table -->

## bf16 against fp32

<!-- begin precision -->
<!-- end precision -->

## The study's claims

<!-- begin claims -->
<!-- end claims -->

## Accuracy by class

<!-- begin classes -->
<!-- end classes -->

## Figures

<!-- begin figures -->
<!-- end figures -->
"""


def fill(document: str, blocks: dict[str, str]) -> str:
    """Replaces the text between the markers of each block; all other text is kept.

    Raises:
        ReportError: A marker is missing.
    """
    for name, content in blocks.items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        before, found_begin, rest = document.partition(begin)
        _, found_end, after = rest.partition(end)
        if not found_begin or not found_end:
            raise ReportError(
                f"the document must contain the lines {begin} and {end}; restore them, or remove the document to get a "
                "new one"
            )
        document = f"{before}{begin}\n{content}\n{end}{after}"
    return document


def write_report(runs: Sequence[Run], output: Path) -> Path:
    """Writes OUTPUT/results.md, and its figures to OUTPUT/results/. Returns the path of the document.

    Raises:
        ReportError: The existing document lacks a marker.
        FileWriteError: The document cannot be written.
    """
    rows = rows_of(runs)
    chosen = main_rows(rows)
    figures = output / "results"
    figures.mkdir(parents=True, exist_ok=True)
    names = draw_curves(chosen, figures)
    dropout_rates = draw_dropout_rates(chosen, figures)
    blocks = {
        "table": study_table(chosen),
        "precision": precision_table(rows),
        "claims": claim_table(chosen),
        "classes": class_table(chosen),
        "figures": figure_block(chosen, names, dropout_rates, draw_reliability(figures), figures.name),
    }
    document = output / "results.md"
    text = document.read_text() if document.exists() else NEW_DOCUMENT
    atomic_write(document, fill(text, blocks).encode())
    return document


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cifar_core.report",
        description="Writes the study's tables, claims and figures from finished runs.",
    )
    parser.add_argument(
        "--runs",
        type=Path,
        metavar="DIR",
        help=f"folder of finished runs; default: {HISTORIES}, the histories of the committed report",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="folder to write results.md and results/ to; default: docs without --runs, otherwise reports",
    )
    parser.add_argument(
        "--keep",
        type=Path,
        metavar="DIR",
        help=f"folder to copy the histories of the runs to, for example {HISTORIES}",
    )
    add_data_argument(parser)
    return parser


def main() -> int:
    """Runs the command."""
    arguments = _parser().parse_args()
    logging.basicConfig(format="%(levelname)s: %(message)s")
    folder = arguments.runs or HISTORIES
    output = arguments.output or (IMAGE_FIGURES if arguments.runs else Path("docs"))
    runs = read_runs(folder)
    # Tables and curves need no data, so nothing is downloaded unless the data was named.
    dataset = load_dataset(arguments.data) if arguments.data or os.environ.get("CIFAR10_DATA") else None
    if dataset is not None:
        evaluate_runs(runs, dataset)
        exported = default_folder(dataset.kind, "exported") / "model.onnx"
        if exported.exists():
            (output / "results").mkdir(parents=True, exist_ok=True)
            measure_calibration(exported, dataset, output / "results" / CALIBRATION)
        runs = read_runs(folder)
    if arguments.keep:
        copy_histories(runs, arguments.keep)
    document = write_report(runs, output)
    print(f"{document}: {len(runs)} runs on {runs[0].data['name']}; figures in {output / 'results'}")
    if dataset is None:
        print("figures 1 and 10 show images and were left out; to draw them set CIFAR10_DATA or use --data")
    else:
        print("figures that show images: " + ", ".join(map(str, draw_image_figures(runs, dataset, IMAGE_FIGURES))))
    return 0
