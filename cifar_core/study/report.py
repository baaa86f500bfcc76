"""Writes the report on finished runs: their accuracies next to the study's, its claims, and its figures.

    python -m cifar_core.report [--runs runs --output reports]

It reads run folders, or the committed histories of runs, and trains nothing. Figures 1 and 10 show images of the data
set; they are written to `reports/`, which git ignores.
"""

import argparse
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from cifar_core.data import Dataset, add_data_argument, load_dataset
from cifar_core.files import atomic_write, path_option
from cifar_core.run_folder import default_folder
from cifar_core.study.drawings import (
    draw_curves,
    draw_dropout_rates,
    draw_image_figures,
    draw_reliability,
    figure_block,
)
from cifar_core.study.keeping import copy_histories
from cifar_core.study.measurements import CALIBRATION, evaluate_runs, measure_calibration
from cifar_core.study.runs import ReportError, Run, main_rows, read_runs, rows_of
from cifar_core.study.tables import accuracy_tables, claim_table, class_table, precision_table

logger = logging.getLogger(__name__)

HISTORIES = Path("docs/results/histories")
"""The committed histories of the published report."""
IMAGE_FIGURES = Path("reports")
"""Folder for figures that show images; git ignores it."""

NEW_DOCUMENT = """# Results

Published results next to our own. `make report` writes every block between markers.

## Published and measured accuracy

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

    Args:
        runs: at least one, all on the same data.
        output: the folder, which need not exist.

    Raises:
        ReportError: The existing document lacks a marker, or the file with the calibration is damaged.
        FileWriteError: The document cannot be written.
    """
    rows = rows_of(runs)
    chosen = main_rows(rows)
    figures = output / "results"
    figures.mkdir(parents=True, exist_ok=True)
    names = draw_curves(chosen, figures)
    dropout_rates = draw_dropout_rates(chosen, figures)
    reliability = draw_reliability(figures, runs[0].data["fingerprint"])
    blocks = {
        "table": accuracy_tables(chosen),
        "precision": precision_table(rows),
        "claims": claim_table(chosen),
        "classes": class_table(chosen),
        "figures": figure_block(chosen, names, dropout_rates, reliability, figures.name),
    }
    document = output / "results.md"
    try:
        text = document.read_text() if document.exists() else NEW_DOCUMENT
    except ValueError as error:
        raise ReportError(f"{document}: this file is not UTF-8 ({error}); restore or remove it") from error
    atomic_write(document, fill(text, blocks).encode())
    return document


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cifar_core.report",
        description="Writes the study's tables, claims and figures from finished runs.",
    )
    parser.add_argument(
        "--runs",
        type=path_option,
        metavar="DIR",
        help=f"folder of finished runs; default: {HISTORIES}, the histories of the committed report",
    )
    parser.add_argument(
        "--output",
        type=path_option,
        metavar="DIR",
        help="folder to write results.md and results/ to; default: docs without --runs, otherwise reports",
    )
    parser.add_argument(
        "--keep",
        type=path_option,
        metavar="DIR",
        help=f"folder to copy the histories of the runs to, for example {HISTORIES}",
    )
    add_data_argument(parser)
    return parser


def main() -> int:
    """Runs the command."""
    arguments = _parser().parse_args()
    logging.basicConfig(format="%(levelname)s: %(message)s")
    output = arguments.output or (IMAGE_FIGURES if arguments.runs else Path("docs"))
    runs = read_runs(arguments.runs or HISTORIES)
    for folder in filter(None, (output / "results", arguments.keep)):  # before measurements that may take minutes
        folder.mkdir(parents=True, exist_ok=True)
    # Tables and curves need no data, so nothing is downloaded unless the data was named.
    dataset = load_dataset(arguments.data) if arguments.data or os.environ.get("CIFAR10_DATA") else None
    if dataset is not None:
        runs = _measure(runs, dataset, output)
    if arguments.keep:
        copy_histories(runs, arguments.keep)
    document = write_report(runs, output)
    print(f"{document}: {len(runs)} runs on {runs[0].data['name']}; figures in {output / 'results'}")
    if dataset is None:
        print("figures 1 and 10 show images and were left out; to draw them set CIFAR10_DATA or use --data")
        return 0
    files = draw_image_figures(runs, dataset, IMAGE_FIGURES)
    print("figures that show images: " + ", ".join(map(str, files)))
    if len(files) == 1:
        print(f"figure 10 was left out: neither a run with weights nor an export was trained on {dataset.name}")
    return 0


def _measure(runs: list[Run], dataset: Dataset, output: Path) -> list[Run]:
    """Takes the measurements that need the data. Returns the runs with their test accuracies."""
    trained_on = runs[0].data
    if trained_on["fingerprint"] != dataset.fingerprint:
        logger.warning(
            "the runs were trained on %s (fingerprint %s), but the data is %s (%s), so neither they nor an export are "
            "measured; give the data of the runs with --data",
            trained_on["name"],
            trained_on["fingerprint"][:12],
            dataset.name,
            dataset.fingerprint[:12],
        )
        return runs
    runs = evaluate_runs(runs, dataset)
    exported = default_folder(dataset.kind, "exported") / "model.onnx"
    if exported.exists():
        measure_calibration(exported, dataset, output / "results" / CALIBRATION)
    return runs
