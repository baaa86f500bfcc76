"""Accuracy of an ONNX file, a run folder, a checkpoint or a running server: the number to trust, and its grounds.

    python -m cifar_core.evaluate [--model exported/model.onnx | grpc://HOST:PORT] [--split test]

Knows nothing of training; every kind of model becomes a function from images to logits and probabilities here.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from scipy.special import softmax
from scipy.stats import binomtest
from sklearn.metrics import confusion_matrix, log_loss
from torch import nn

from cifar_core.calibration import expected_calibration_error, negative_log_likelihood, reliability
from cifar_core.data import Dataset, Images, add_data_argument, load_dataset, split
from cifar_core.device import DEVICES, choose_device
from cifar_core.errors import CifarError, run_command
from cifar_core.models import make_model
from cifar_core.run_folder import RunFolder, atomic_write, default_place, load_checkpoint, to_json

BATCH = 256
SERVER_SCHEME = "grpc://"

UInt8 = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


class EvaluationError(CifarError):
    """A model that cannot be read, or that does not go with the data."""


@dataclass(frozen=True)
class Predictor:
    """A model, whatever it was read from.

    Attributes:
        name: for the report: recipe and seed, or the model version.
        classes: in the order of the outputs.
        predict: uint8 [N, 32, 32, 3] → logits and probabilities, float32 [N, classes].
        split: how its training images were split, as `data.split` takes it after the count; None where it is not known.
        trained_on: fingerprint of the data it was trained on.
        tells_logits: whether the logits are the network's own.
    """

    name: str
    classes: tuple[str, ...]
    predict: Callable[[UInt8], tuple[Floats, Floats]]
    split: tuple[int, int] | None
    trained_on: str
    tells_logits: bool = True


def build_model(checkpoint: dict[str, Any]) -> nn.Sequential:
    """The network of a checkpoint with its weights, in evaluation mode on the CPU.

    Raises:
        EvaluationError: the weights are not those of the network that the recipe names.
    """
    recipe = checkpoint["recipe"]
    try:
        # Checkpoints from before there was `width` lack it.
        model = make_model(recipe["model"], len(checkpoint["classes"]), recipe["dropout"], recipe.get("width", 0))
        model.load_state_dict(checkpoint["model"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise EvaluationError(f"this checkpoint's weights do not go with its recipe ({error}); train again") from error
    return model.eval()


def torch_predictor(checkpoint: dict[str, Any], device: torch.device) -> Predictor:
    """A checkpoint, computed by torch in fp32."""
    model = build_model(checkpoint).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    @torch.inference_mode()
    def predict(images: UInt8) -> tuple[Floats, Floats]:
        logits = model(torch.from_numpy(images).to(device))
        return logits.cpu().numpy(), torch.softmax(logits, 1).cpu().numpy()

    recipe = checkpoint["recipe"]
    name = f"{recipe['name']}, seed {checkpoint['seed']}, epoch {checkpoint['epoch']}"
    divided = (recipe["validation_images"], recipe["split_seed"])
    return Predictor(name, tuple(checkpoint["classes"]), predict, divided, checkpoint["data"]["fingerprint"])


def onnx_predictor(model: Path | bytes, device: torch.device) -> Predictor:
    """An exported graph, computed by onnxruntime.

    Raises:
        EvaluationError: not an ONNX file of this project's form; or CUDA without onnxruntime's CUDA provider.
    """
    import onnxruntime

    name = str(model) if isinstance(model, Path) else "the exported graph"
    if isinstance(model, Path) and not model.is_file():
        raise EvaluationError(f"{model}: no such file; export one with: make train export")
    provider = "CUDAExecutionProvider" if device.type == "cuda" else "CPUExecutionProvider"
    if provider not in onnxruntime.get_available_providers():
        raise EvaluationError(
            f"onnxruntime {onnxruntime.__version__} has no {provider}; install the extra cuda, or use --device cpu"
        )
    try:
        session = onnxruntime.InferenceSession(model if isinstance(model, bytes) else str(model), providers=[provider])
    except Exception as error:
        raise EvaluationError(
            f"{name}: cannot be read as an ONNX file ({str(error).splitlines()[0]}); export it again"
        ) from error
    if provider not in session.get_providers():
        # onnxruntime falls back to the CPU without a word.
        raise EvaluationError(
            f"onnxruntime could not start its {provider}; check the CUDA libraries, or use --device cpu"
        )
    metadata = session.get_modelmeta().custom_metadata_map
    inputs = [(each.name, each.type, each.shape[1:]) for each in session.get_inputs()]
    outputs = [each.name for each in session.get_outputs()]
    if (
        inputs != [("images", "tensor(uint8)", [32, 32, 3])]
        or outputs != ["logits", "probabilities"]
        or "classes" not in metadata
    ):
        raise EvaluationError(
            f"{name}: not a graph of this project (its inputs are {inputs}, its outputs {outputs}); export it again"
        )

    def predict(images: UInt8) -> tuple[Floats, Floats]:
        logits, probabilities = session.run(outputs, {"images": images})
        return logits, probabilities

    divided = (int(metadata["validation_images"]), int(metadata["split_seed"]))
    return Predictor(
        metadata["model_version"], tuple(json.loads(metadata["classes"])), predict, divided, metadata["trained_on"]
    )


def server_predictor(target: str) -> Predictor:
    """A running server at HOST:PORT, asked over gRPC; the logits are logarithms of its probabilities.

    Raises:
        EvaluationError: it does not answer.
    """
    from service.client import ClassificationError, Client, Options

    try:
        with Client(target, Options(attempts=3)) as first:  # whether anybody is there is soon known
            model = first.model()
    except ClassificationError as error:
        raise EvaluationError(
            f"{SERVER_SCHEME}{target} does not answer ({error}); start a server with: make serve"
        ) from error

    client = Client(target)

    def predict(images: UInt8) -> tuple[Floats, Floats]:
        try:
            probabilities = client.probabilities(images)
        except ClassificationError as error:
            raise EvaluationError(f"{SERVER_SCHEME}{target} stopped answering ({error})") from error
        with np.errstate(divide="ignore"):
            return np.log(probabilities), probabilities

    name = f"{model.version} at {SERVER_SCHEME}{target} ({model.variant} on {model.device})"
    return Predictor(name, tuple(model.classes), predict, None, model.trained_on, tells_logits=False)


def load_predictor(place: str | Path, device: torch.device) -> Predictor:
    """Reads an .onnx file, a run folder (its best weights) or a .pt file, or asks a server at grpc://HOST:PORT.

    Raises:
        EvaluationError, RunError: none of these, damaged, or not this project's.
    """
    if str(place).startswith(SERVER_SCHEME):
        return server_predictor(str(place).removeprefix(SERVER_SCHEME))
    model = Path(place)
    if model.suffix == ".onnx":
        return onnx_predictor(model, device)
    return torch_predictor(load_checkpoint(RunFolder(model).best if model.is_dir() else model), device)


def predict_all(predictor: Predictor, images: UInt8) -> tuple[Floats, Floats]:
    """Logits and probabilities, float32 [N, classes] each, of uint8 [N, 32, 32, 3], in batches."""
    parts = [predictor.predict(images[first : first + BATCH]) for first in range(0, len(images), BATCH)]
    logits, probabilities = zip(*parts, strict=True)
    return np.concatenate(logits), np.concatenate(probabilities)


def check_classes(predictor: Predictor, dataset: Dataset) -> None:
    """Raises EvaluationError unless the model's classes are the data's, in the same order."""
    if predictor.classes != dataset.classes:
        raise EvaluationError(
            f"{predictor.name} knows the classes {', '.join(predictor.classes)}, but {dataset.name} holds "
            f"{', '.join(dataset.classes)}; evaluate it on the data it was trained for, with --data"
        )


def wilson_interval(correct: int, count: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a share (Wilson 1927)."""
    interval = binomtest(correct, count).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def choose_split(
    predictor: Predictor, dataset: Dataset, which: Literal["test", "validation"]
) -> tuple[Images, npt.NDArray[np.int64]]:
    """The images to evaluate on, and their indices in the set they come from.

    Raises:
        EvaluationError: the model does not say which images were held out from it.
    """
    if which == "test":
        return dataset.test, np.arange(len(dataset.test))
    if predictor.split is None:
        raise EvaluationError(
            f"{predictor.name} does not tell which images were held out; evaluate its file, or --split test"
        )
    _, indices = split(len(dataset.train), *predictor.split)
    return Images(dataset.train.images[indices], dataset.train.labels[indices]), indices.numpy()


def _calibration(
    probabilities: npt.NDArray[np.float64], logits: Floats | None, labels: npt.NDArray[np.int64]
) -> dict[str, Any]:
    """Calibration error and loss of the softmax of the logits as well, which lacks the graph's temperature."""
    before = None if logits is None else softmax(logits.astype(np.float64), axis=1)
    return {
        "ece": expected_calibration_error(probabilities, labels),
        "ece_before": None if before is None else expected_calibration_error(before, labels),
        "loss_before": None if logits is None else negative_log_likelihood(logits, labels),
        "bins": [dataclasses.asdict(each) for each in reliability(probabilities, labels)],
        "bins_before": None if before is None else [dataclasses.asdict(each) for each in reliability(before, labels)],
    }


def evaluate(predictor: Predictor, dataset: Dataset, which: Literal["test", "validation"] = "test") -> dict[str, Any]:
    """Measures a model on a split.

    Args:
        predictor: the model.
        dataset: of the classes that it knows.
        which: the test images, or the training images that were held out.

    Returns:
        Plain values: `model`, `data`, `split`, `images`, `correct`, `accuracy`, `interval` (95 %, Wilson), `loss`
        (cross-entropy), `calibration` (`ece`, the expected calibration error, and its `bins`; `ece_before`,
        `bins_before`, `loss_before`: without the graph's temperature, None where a server does not tell), `per_class`
        (accuracy by class name), `confusion` (rows: true classes; columns: predicted), `confident_mistakes` (ten:
        index in the set, label, prediction, probability), `images_per_second`.

    Raises:
        EvaluationError: the model's classes are not the data's.
    """
    check_classes(predictor, dataset)
    data, indices = choose_split(predictor, dataset, which)
    images, labels = data.images.numpy(), data.labels.numpy()
    predictor.predict(images[:BATCH])  # the first batch pays for allocations that the others share
    started = time.perf_counter()
    logits, probabilities = predict_all(predictor, images)
    seconds = time.perf_counter() - started
    predicted = probabilities.argmax(1)
    names, every = predictor.classes, np.arange(len(predictor.classes))
    confusion = confusion_matrix(labels, predicted, labels=every)
    correct = int(confusion.trace())
    confidence = probabilities.max(1)
    wrong = np.flatnonzero(predicted != labels)
    mistakes = wrong[np.argsort(-confidence[wrong], kind="stable")][:10]
    totals = confusion.sum(1)
    # In double: a float32 probability of a hopeless class can be 0, and its logarithm must stay finite.
    in_double = probabilities.astype(np.float64)
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
        "loss": float(log_loss(labels, in_double / in_double.sum(1, keepdims=True), labels=every)),
        "calibration": _calibration(in_double, logits if predictor.tells_logits else None, labels),
        "per_class": {
            name: float(confusion[row, row] / totals[row]) if totals[row] else None for row, name in enumerate(names)
        },
        "confusion": confusion.tolist(),
        "confident_mistakes": [
            {
                "index": int(indices[row]),
                "label": names[labels[row]],
                "predicted": names[predicted[row]],
                "probability": float(confidence[row]),
            }
            for row in mistakes
        ],
        "images_per_second": len(labels) / seconds,
    }


def _calibration_text(result: dict[str, Any]) -> str:
    calibration = result["calibration"]
    text = f"expected calibration error {calibration['ece']:.2%}"
    if calibration["ece_before"] is not None and calibration["loss_before"] != result["loss"]:
        text += f" (without the temperature {calibration['ece_before']:.2%}, loss {calibration['loss_before']:.4f})"
    return text


def report(result: dict[str, Any]) -> str:
    """An evaluation as text for a terminal."""
    low, high = result["interval"]
    lines = [
        f"{result['model']} on {result['data']['name']}, {result['split']} split, {result['images']:,} images"
        + ("" if result["data"]["trained_on_it"] else " (not the data that it was trained on)"),
        f"accuracy {result['accuracy']:.2%} (95 % interval {low:.2%} to {high:.2%}; {result['correct']:,} right)   "
        f"loss {result['loss']:.4f}   {result['images_per_second']:,.0f} images/s",
        _calibration_text(result),
        "",
    ]
    names = list(result["per_class"])
    width = max(map(len, names))
    counts = max(5, len(str(result["images"])) + 1)
    lines.append(
        f"{'true class':{width}s}  accuracy  predicted as "
        + "".join(f"{name[: counts - 1]:>{counts}s}" for name in names)
    )
    for name, row in zip(names, result["confusion"], strict=True):
        accuracy = result["per_class"][name]
        share = "       –" if accuracy is None else f"{accuracy:8.2%}"
        lines.append(f"{name:{width}s}  {share}               " + "".join(f"{count:{counts}d}" for count in row))
    lines += ["", "most confident mistakes (index: true class, predicted class with probability)"]
    lines += [
        f"  {each['index']:6d}: {each['label']}, {each['predicted']} {each['probability']:.2%}"
        for each in result["confident_mistakes"]
    ]
    return "\n".join(lines)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m cifar_core.evaluate", description="Accuracy of a model on a data set."
    )
    parser.add_argument(
        "--model",
        metavar="PATH|grpc://HOST:PORT",
        help="an .onnx file, a run folder, a .pt file or a running server; default: exported/model.onnx "
        "(synthetic/exported/model.onnx for generated data)",
    )
    add_data_argument(parser)
    parser.add_argument("--split", choices=("test", "validation"), default="test", help="default: %(default)s")
    parser.add_argument("--device", choices=DEVICES, default="cpu", help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured here too")
    arguments = parser.parse_args()
    dataset = load_dataset(arguments.data)
    model = arguments.model or default_place(dataset.kind, "exported") / "model.onnx"
    result = evaluate(load_predictor(model, choose_device(arguments.device)), dataset, arguments.split)
    print(report(result))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(arguments.json, to_json(result))
    return 0


if __name__ == "__main__":
    run_command(main)
