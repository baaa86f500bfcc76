"""Measures the accuracy and calibration of an export, an ONNX file, a run, a checkpoint or a running server.

python -m cifar_core.evaluate [--model exported | grpc://HOST:PORT] [--split test]

Prints a summary; `--json` writes every measurement to a file.
"""

import argparse
import dataclasses
import logging
import math
import time
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy.special import softmax

from cifar_core.calibration import (
    PRIOR_DEVIATION,
    SMALLEST_SAMPLE,
    Calibration,
    calibration_interval,
    expected_calibration_error,
    negative_log_likelihood,
    reliability,
)
from cifar_core.data import Dataset, Images, add_data_argument, load_dataset, split
from cifar_core.device import DEVICES, choose_device
from cifar_core.errors import CifarError, program_name, run_command
from cifar_core.files import check_output, not_empty, path_option, to_json, write_output
from cifar_core.manifest import CalibrationScale
from cifar_core.predictors import BATCH, Floats, Predictor, load_predictor, predict_all
from cifar_core.run_folder import default_folder

MISTAKES = 10
"""Number of the most confident mistakes in an evaluation."""

Int64 = npt.NDArray[np.int64]
Doubles = npt.NDArray[np.float64]
SplitName = Literal["test", "validation"]


class EvaluationError(CifarError):
    """A model that cannot be evaluated on these images."""


def check_classes(predictor: Predictor, dataset: Dataset) -> None:
    """Raises EvaluationError unless model and data have the same classes in the same order."""
    if predictor.classes != dataset.classes:
        raise EvaluationError(
            f"{predictor.name} has the classes {', '.join(predictor.classes)}, but {dataset.name} has "
            f"{', '.join(dataset.classes)}; evaluate the model on data with its own classes, with --data"
        )


def choose_split(predictor: Predictor, dataset: Dataset, which: SplitName) -> tuple[Images, Int64]:
    """The images of a split, and their indices in the training or test set that they come from.

    Raises:
        EvaluationError: The model does not say which training images were held out.
    """
    if which == "test":
        return dataset.test, np.arange(len(dataset.test))
    if predictor.split is None:
        raise EvaluationError(
            f"{predictor.name} does not say which images were held out for validation; evaluate the model file "
            "instead, or use --split test"
        )
    _, validation_indices = split(len(dataset.train), *predictor.split)
    images = Images(dataset.train.images[validation_indices], dataset.train.labels[validation_indices])
    return images, validation_indices.numpy()


def wilson_interval(correct: int, count: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a share (Wilson 1927)."""
    share, z = correct / count, NormalDist().inv_cdf(0.975)
    centre, half = share + z**2 / (2 * count), z * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    low, high = ((centre + sign * half) / (1 + z**2 / count) for sign in (-1, 1))
    return max(0.0, low), min(1.0, high)


def evaluate(predictor: Predictor, dataset: Dataset, which: SplitName = "test") -> dict[str, Any]:
    """Measures a model on a split.

    Args:
        predictor: the model.
        dataset: data with the classes of the model.
        which: the test images, or the training images that were held out for validation.

    Returns:
        Plain values: `model`, `data`, `split`, `images`, `correct`, `accuracy` (0 to 1), `interval` (95 %, Wilson),
        `loss` (mean cross-entropy in nats), `calibration` (`ece`, the expected calibration error, `ece_interval` (95 %,
        bootstrap) and its `bins`; `ece_equal_mass` and its interval, with bins of equal counts; `ece_before`,
        `bins_before` and `loss_before` are without the calibration of the graph, and None for a server),
        `per_class` (accuracy by class name), `confusion` (rows: true classes, columns: predicted classes),
        `confident_mistakes` (ten of index in the set, label, predicted class and probability), `images_per_second`.

    Raises:
        EvaluationError: Model and data have different classes, or the model does not know the split.
    """
    check_classes(predictor, dataset)
    data, indices = choose_split(predictor, dataset, which)
    images, labels = data.images.numpy(), data.labels.numpy()
    predictor.predict(images[:BATCH])  # a warm-up: the first batch allocates memory that later batches reuse
    started = time.perf_counter()
    logits, float_probabilities = predict_all(predictor, images)
    seconds = time.perf_counter() - started
    probabilities = float_probabilities.astype(np.float64)
    confusion = np.zeros((len(predictor.classes),) * 2, np.int64)
    np.add.at(confusion, (labels, probabilities.argmax(1)), 1)
    correct = int(confusion.trace())
    return {
        "model": predictor.name,
        "data": {
            "name": dataset.name,
            "fingerprint": dataset.fingerprint,
            "trained_on_it": dataset.fingerprint == predictor.trained_on,
        },
        "split": which,
        "images": len(labels),
        "correct": correct,
        "accuracy": correct / len(labels),
        "interval": wilson_interval(correct, len(labels)),
        "loss": _loss(probabilities, labels) if predictor.calibrated else negative_log_likelihood(logits, labels),
        "calibration": _calibration(probabilities, logits if predictor.has_logits else None, labels),
        "per_class": {
            name: float(row[number] / row.sum()) if row.sum() else None
            for number, (name, row) in enumerate(zip(predictor.classes, confusion, strict=True))
        },
        "confusion": confusion.tolist(),
        "confident_mistakes": _confident_mistakes(float_probabilities, labels, indices, predictor.classes),
        "images_per_second": len(labels) / seconds,
    }


def _loss(probabilities: Doubles, labels: Int64) -> float:
    """The mean cross-entropy in nats. A float32 probability that rounded to 0 counts as the smallest one above."""
    of_the_label = probabilities[np.arange(len(labels)), labels] / probabilities.sum(1)
    return float(-np.log(of_the_label.clip(np.finfo(np.float32).smallest_subnormal)).mean())


def manifest_fields(result: dict[str, Any]) -> dict[str, Any]:
    """The fields of a variant in the manifest that hold these measurements on the test images."""
    calibration = result["calibration"]
    return {
        "test_accuracy": result["accuracy"],
        "test_images": result["images"],
        "test_loss": result["loss"],
        "test_loss_before": calibration["loss_before"],
        "test_ece": calibration["ece"],
        "test_ece_before": calibration["ece_before"],
        "test_ece_equal_mass": calibration["ece_equal_mass"],
    }


def manifest_scale(calibration: Calibration, images: int, chose_epoch: bool) -> CalibrationScale:
    """The entry of a calibration in the manifest.

    Args:
        calibration: as `choose_calibration` returned it.
        images: number of held-out images that it was fitted on.
        chose_epoch: whether these images also chose the epoch.
    """
    scale = CalibrationScale(
        form=calibration.form, coefficients=calibration.coefficients, images=images, chose_epoch=chose_epoch
    )
    return scale.model_copy(update={"prior_deviation": PRIOR_DEVIATION}) if images < SMALLEST_SAMPLE else scale


def _calibration(probabilities: Doubles, logits: Floats | None, labels: Int64) -> dict[str, Any]:
    """Calibration as the graph computes it and, from the softmax of the logits, without it ("before")."""
    before = None if logits is None else softmax(logits.astype(np.float64), axis=1)
    return {
        "ece": expected_calibration_error(probabilities, labels),
        "ece_interval": calibration_interval(probabilities, labels),
        "ece_equal_mass": expected_calibration_error(probabilities, labels, equal_mass=True),
        "ece_equal_mass_interval": calibration_interval(probabilities, labels, equal_mass=True),
        "ece_before": None if before is None else expected_calibration_error(before, labels),
        "loss_before": None if logits is None else negative_log_likelihood(logits, labels),
        "bins": _bins(probabilities, labels),
        "bins_before": None if before is None else _bins(before, labels),
    }


def _bins(probabilities: Doubles, labels: Int64) -> list[dict[str, Any]]:
    return [dataclasses.asdict(group) for group in reliability(probabilities, labels)]


def _confident_mistakes(
    probabilities: Floats, labels: Int64, indices: Int64, classes: tuple[str, ...]
) -> list[dict[str, Any]]:
    """The mistakes with the highest probabilities, the highest first."""
    predicted, confidence = probabilities.argmax(1), probabilities.max(1)
    wrong = np.flatnonzero(predicted != labels)
    return [
        {
            "index": int(indices[row]),
            "label": classes[labels[row]],
            "predicted": classes[predicted[row]],
            "probability": float(confidence[row]),
        }
        for row in wrong[np.argsort(-confidence[wrong], kind="stable")][:MISTAKES]
    ]


def report(result: dict[str, Any]) -> str:
    """An evaluation as text for a terminal."""
    low, high = result["interval"]
    other_data = "" if result["data"]["trained_on_it"] else " (not the data that the model was trained on)"
    lines = [
        f"{result['model']} on {result['data']['name']}, {result['split']} split, {result['images']:,} images"
        f"{other_data}",
        f"accuracy {result['accuracy']:.2%} (95 % interval {low:.2%} to {high:.2%}; {result['correct']:,} correct)   "
        f"loss {result['loss']:.4f}   {result['images_per_second']:,.0f} images/s",
        _calibration_text(result),
        "",
        *_confusion_lines(result),
        "",
        "most confident mistakes (index: true class, predicted class with probability)",
    ]
    lines += [
        f"  {mistake['index']:6d}: {mistake['label']}, {mistake['predicted']} {mistake['probability']:.2%}"
        for mistake in result["confident_mistakes"]
    ]
    return "\n".join(lines)


def _calibration_text(result: dict[str, Any]) -> str:
    calibration = result["calibration"]
    low, high = calibration["ece_interval"]
    text = (
        f"expected calibration error {calibration['ece']:.2%} (95 % interval {low:.2%} to {high:.2%}); with bins of "
        f"equal counts {calibration['ece_equal_mass']:.2%}"
    )
    if calibration["ece_before"] is not None and calibration["loss_before"] != result["loss"]:
        text += f"; without the calibration {calibration['ece_before']:.2%}, loss {calibration['loss_before']:.4f}"
    return text


def _confusion_lines(result: dict[str, Any]) -> list[str]:
    names = list(result["per_class"])
    name_width = max(len("true class"), *map(len, names))
    count_width = max(5, len(str(result["images"])) + 1)
    header = "".join(f"{name[: count_width - 1]:>{count_width}s}" for name in names)
    lines = [f"{'true class':{name_width}s}  accuracy  predicted as {header}"]
    for name, row in zip(names, result["confusion"], strict=True):
        accuracy = result["per_class"][name]
        share = "       –" if accuracy is None else f"{accuracy:8.2%}"
        counts = "".join(f"{count:{count_width}d}" for count in row)
        lines.append(f"{name:{name_width}s}  {share}               {counts}")
    return lines


def main() -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog=program_name("cifar_core.evaluate"),
        description="Measures the accuracy and calibration of a model on a data set.",
    )
    parser.add_argument(
        "--model",
        type=not_empty,
        metavar="PATH|grpc://HOST:PORT",
        help="model to evaluate: an export (its fp32 variant), a run folder, an .onnx file, a .pt file or a running "
        "server; default: exported/model.onnx (synthetic/exported/model.onnx for synthetic data)",
    )
    add_data_argument(parser)
    parser.add_argument(
        "--split",
        choices=("test", "validation"),
        default="test",
        help="images to evaluate on: the test images, or the training images that were held out; default: %(default)s",
    )
    parser.add_argument(
        "--device",
        choices=DEVICES,
        default="cpu",
        help="device to compute on; auto is CUDA if available; a server ignores it; default: %(default)s",
    )
    parser.add_argument("--json", type=path_option, metavar="FILE", help="file to write all measurements to, as JSON")
    arguments = parser.parse_args()
    logging.basicConfig(format="%(levelname)s: %(message)s")
    if arguments.json:  # a file that cannot be written should not cost an evaluation
        check_output(arguments.json)
    dataset = load_dataset(arguments.data)
    model = arguments.model or default_folder(dataset.kind, "exported") / "model.onnx"
    result = evaluate(load_predictor(model, choose_device(arguments.device)), dataset, arguments.split)
    print(report(result))
    if arguments.json:
        write_output(arguments.json, to_json(result))
    return 0


if __name__ == "__main__":
    run_command(main)
