"""Measurements that the report needs and makes itself: accuracies on the test images, calibration of the export."""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cifar_core.calibration import Bin
from cifar_core.data import Dataset
from cifar_core.device import CPU
from cifar_core.evaluate import evaluate
from cifar_core.files import FileWriteError, atomic_write, to_json
from cifar_core.predictors import load_predictor
from cifar_core.study.runs import ReportError, Run, evaluation_file

logger = logging.getLogger(__name__)

CALIBRATION = "calibration.json"
"""Name of the file that holds the calibration of the export, next to the figures."""


def evaluate_runs(runs: Iterable[Run], dataset: Dataset) -> list[Run]:
    """Evaluates the weights of each run on the test images, once, and keeps the result in the run folder.

    Runs without weights, such as the committed histories, and runs of other data are returned as they are. If a run
    folder cannot be written to, a warning says that its result is not kept.
    """
    return [_evaluated(run, dataset) for run in runs]


def _evaluated(run: Run, dataset: Dataset) -> Run:
    if run.test is not None or not run.folder.best.exists() or run.data["fingerprint"] != dataset.fingerprint:
        return run
    result = evaluate(load_predictor(run.folder.path, CPU), dataset, "test")
    keys = ("model", "data", "split", "images", "correct", "accuracy", "interval", "loss", "per_class")
    test = {key: result[key] for key in keys}
    try:
        atomic_write(evaluation_file(run.folder), to_json(test))
    except FileWriteError as error:
        logger.warning("%s; this report has the result, and the next one measures it again", error)
    return dataclasses.replace(run, test=test)


@dataclass(frozen=True)
class MeasuredCalibration:
    """The calibration of an exported graph on the test images.

    Attributes:
        sha256: SHA-256 of the graph, in hexadecimal.
        model: version of the model.
        fingerprint: fingerprint of the data.
        images: number of test images.
        before: calibration error and bins without the calibration.
        exported: the same as exported.
    """

    sha256: str
    model: str
    fingerprint: str
    images: int
    before: tuple[float, list[Bin]]
    exported: tuple[float, list[Bin]]


def measure_calibration(exported: Path, dataset: Dataset, file: Path) -> None:
    """Writes the calibration of an exported graph on the test images, unless the file holds that of this graph.

    Does nothing if the model was trained on other data.

    Raises:
        PredictorError: The graph is damaged, or not one of this project.
        ReportError: The file is damaged.
        FileWriteError: The file cannot be written.
    """
    predictor = load_predictor(exported, CPU)
    digest = hashlib.sha256(exported.read_bytes()).hexdigest()  # a new calibration keeps the version of the model
    measured = read_calibration(file)
    if predictor.trained_on == dataset.fingerprint and (measured is None or measured.sha256 != digest):
        result = evaluate(predictor, dataset, "test")
        keys = ("model", "data", "images", "accuracy", "loss", "calibration")
        atomic_write(file, to_json({"sha256": digest} | {key: result[key] for key in keys}))


def read_calibration(file: Path) -> MeasuredCalibration | None:
    """What `measure_calibration` wrote; None if it wrote nothing.

    Raises:
        ReportError: The file is damaged.
    """
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        return None
    try:
        measured = json.loads(content)
        calibration = measured["calibration"]
        return MeasuredCalibration(
            str(measured["sha256"]),
            str(measured["model"]),
            str(measured["data"]["fingerprint"]),
            int(measured["images"]),
            (float(calibration["ece_before"]), _bins(calibration["bins_before"])),
            (float(calibration["ece"]), _bins(calibration["bins"])),
        )
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise ReportError(
            f"{file}: this file is damaged ({type(error).__name__}: {error}); put it back, or remove it and write the "
            "report again"
        ) from error


def _bins(groups: list[dict[str, Any]]) -> list[Bin]:
    return [Bin(int(group["count"]), float(group["confidence"]), float(group["accuracy"])) for group in groups]
