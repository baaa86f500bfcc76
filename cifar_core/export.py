"""A finished run -> `exported/`: the ONNX graph and the manifest that names it, both or neither.

    python -m cifar_core.export [--run runs/deep/0]

The graph holds everything between a decoder's bytes and the probabilities, so that no client can get it wrong. It is
checked against torch on real images before anything in `exported/` is touched. Reads run folders, and knows nothing of
training.
"""

import argparse
import ctypes
import errno
import hashlib
import json
import logging
import os
import shutil
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from scipy.special import softmax
from torch import Tensor, nn

from cifar_core.calibration import fit_temperature
from cifar_core.data import Dataset, add_data_argument, load_dataset, split
from cifar_core.device import CPU
from cifar_core.errors import CifarError, run_command
from cifar_core.evaluate import (
    Predictor,
    build_model,
    check_classes,
    choose_split,
    evaluate,
    onnx_predictor,
    predict_all,
    torch_predictor,
)
from cifar_core.models import folded
from cifar_core.quantise import CALIBRATION_IMAGES, to_int8
from cifar_core.run_folder import RunFolder, best_epoch, default_place, finished_runs, load_checkpoint, to_json

SCHEMA_VERSION = 1
PARITY_IMAGES = 1000
PARITY_BATCHES = (1, 7, 256)
PARITY_LIMIT = 1e-5
"""The greatest difference of a probability between onnxruntime and torch at which an export still counts."""
VARIANTS = {"fp32", "int8"}
INT8_LIMIT = 0.01
"""The share of validation images by which int8 may be right less often than fp32."""


class ExportError(CifarError):
    """An export that did not come about; what `exported/` held is untouched."""


class Classifier(nn.Module):
    """The graph that is served: uint8 [N, 32, 32, 3] → logits and probabilities, float32 [N, classes] each.

    Args:
        network: images to logits.
        temperature: that the logits are divided by before the softmax; see `calibration`.
    """

    def __init__(self, network: nn.Module, temperature: float = 1.0) -> None:
        super().__init__()
        self.network = network
        self.temperature = temperature

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.network(images)
        return logits, torch.softmax(logits / self.temperature, 1)


def pick_run(runs: Path) -> RunFolder:
    """The finished run, of whichever recipe, with the best validation accuracy; the test set has no say.

    Raises:
        ExportError: there is none.
    """
    finished = finished_runs(runs)
    if not finished:
        raise ExportError(f"{runs}: holds no finished run; train one with: make train")
    return max(finished, key=lambda run: float(best_epoch(run.history())["validation_accuracy"]))


def to_onnx(network: nn.Sequential, metadata: dict[str, str], temperature: float = 1.0) -> bytes:
    """The graph of a network, with a dynamic batch and batch normalisation folded away, checked by onnx's checker.

    Args:
        network: uint8 [N, 32, 32, 3] → logits, in evaluation mode on the CPU.
        metadata: written into the file.
        temperature: that the logits are divided by before the softmax.
    """
    # Two images and not one: the exporter takes a dimension of 1 for a constant.
    example = torch.zeros(2, 32, 32, 3, dtype=torch.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations, nothing a user could act on
        program = torch.onnx.export(
            Classifier(folded(network), temperature).eval(),
            (example,),
            input_names=["images"],
            output_names=["logits", "probabilities"],
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
            dynamo=True,
            optimize=True,
            verbose=False,
        )
    if program is None:
        raise ExportError("torch.onnx.export gave no program")
    model = program.model_proto
    # The exporter notes where in the source each node came from, with paths of the machine that exported.
    for node in model.graph.node:
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info, *model.graph.initializer):
        value.ClearField("metadata_props")
    model.graph.ClearField("metadata_props")
    onnx.helper.set_model_props(model, metadata)
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString())


def measure_parity(
    reference: Predictor, exported: Predictor, dataset: Dataset, temperature: float = 1.0
) -> dict[str, Any]:
    """Compares two forms of a model on 1,000 images (fewer where the data has fewer), in batches of 1, 7 and 256.

    Args:
        reference: what was trained; torch's.
        exported: its graph.
        dataset: whose held-out images are taken.
        temperature: that the graph has and the reference has not.

    Raises:
        ExportError: a probability differs by more than `PARITY_LIMIT`, or any image's class differs.
    """
    data, _ = choose_split(reference, dataset, "validation")
    # The held-out images first; small data sets are filled up with training images.
    images = np.concatenate([data.images.numpy(), dataset.train.images[:PARITY_IMAGES].numpy()])[:PARITY_IMAGES]
    expected_logits, _ = predict_all(reference, images)
    # At the graph's temperature, and without it: one that makes all classes alike would hide a difference.
    temperatures = (temperature, 1.0)
    expected = [softmax(expected_logits / each, axis=1) for each in temperatures]
    greatest, greatest_logit, differing = 0.0, 0.0, 0
    for size in PARITY_BATCHES:
        parts = [exported.predict(images[first : first + size]) for first in range(0, len(images), size)]
        logits, probabilities = (np.concatenate(each) for each in zip(*parts, strict=True))
        for told, wanted in zip((probabilities, softmax(logits, axis=1)), expected, strict=True):
            greatest = max(greatest, float(np.abs(told - wanted).max()))
        greatest_logit = max(greatest_logit, float(np.abs(logits - expected_logits).max()))
        differing += int((probabilities.argmax(1) != expected_logits.argmax(1)).sum())
    if not greatest < PARITY_LIMIT or differing:
        raise ExportError(
            f"the exported graph differs from torch: probabilities by up to {greatest:.1e} (limit {PARITY_LIMIT:.0e}), "
            f"the class of {differing} images (limit 0); nothing was exported; "
            "try other versions of torch, onnx and onnxruntime (constraints.txt has those that were tested)"
        )
    return {
        "images": len(images),
        "batch_sizes": list(PARITY_BATCHES),
        "max_abs_difference_of_probabilities": greatest,
        "max_abs_difference_of_logits": greatest_logit,
        "differing_classes": differing,
    }


def _exchange(one: Path, other: Path) -> None:
    """Swaps two folders in one step, so that whoever looks finds one or the other, whole.

    Where the system cannot (Linux can on all common file systems), by two renames, undone if the second fails.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    at_fdcwd, rename_exchange = -100, 2
    if hasattr(libc, "renameat2"):
        if libc.renameat2(at_fdcwd, os.fsencode(one), at_fdcwd, os.fsencode(other), rename_exchange) == 0:
            return
        number = ctypes.get_errno()
        if number not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise OSError(number, os.strerror(number))
    aside = one.with_name(one.name + ".aside")
    other.rename(aside)
    try:
        one.rename(other)
    except OSError:
        aside.rename(other)
        raise
    aside.rename(one)


def _named_files(folder: Path) -> set[str]:
    """The files that an export consists of: its manifest and those that it names."""
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        return {"manifest.json"} | {variant["file"] for variant in manifest["variants"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {"manifest.json", "model.onnx"}  # none, or torn: what an export has at least


def publish(target: Path, files: dict[str, bytes]) -> None:
    """Replaces an export as a whole. Files in the folder that are no part of the export before stay.

    Raises:
        ExportError: it cannot be written, for want of space say; what was there is untouched.
    """
    staging = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        staging.chmod(0o755)
        for name, content in files.items():
            with (staging / name).open("wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
        if target.exists():
            for entry in target.iterdir():
                if entry.name not in _named_files(target) | files.keys():
                    (shutil.copytree if entry.is_dir() else shutil.copy2)(entry, staging / entry.name)
            _exchange(staging, target)
        else:
            staging.rename(target)
    except OSError as error:
        raise ExportError(
            f"{target}: cannot be written, {error.strerror}; what it held is untouched; "
            "make room or choose --output DIR"
        ) from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)  # by now the export before, or what was not finished


def current_export(target: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest in a folder if it is that of the same weights, data and libraries, complete, and its files whole."""
    try:
        manifest: dict[str, Any] = json.loads((target / "manifest.json").read_bytes())
        same = all(manifest[key] == value for key, value in identity.items())
        whole = all(
            hashlib.sha256((target / variant["file"]).read_bytes()).hexdigest() == variant["sha256"]
            for variant in manifest["variants"].values()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # nothing there, or torn: to be written
    complete = same and whole and manifest["variants"].keys() == VARIANTS and "temperature" in manifest
    return manifest if complete else None


def _variant(file: str, graph: bytes, predictor: Predictor, dataset: Dataset) -> dict[str, Any]:
    """A graph's entry in the manifest, with what it attains on the test images; `before`: without the temperature."""
    result = evaluate(predictor, dataset, "test")
    return {
        "file": file,
        "sha256": hashlib.sha256(graph).hexdigest(),
        "test_accuracy": result["accuracy"],
        "test_images": result["images"],
        "test_loss": result["loss"],
        "test_loss_before": result["calibration"]["loss_before"],
        "test_ece": result["calibration"]["ece"],
        "test_ece_before": result["calibration"]["ece_before"],
    }


def quantised(
    graph: bytes, exported: Predictor, dataset: Dataset, training: npt.NDArray[np.int64]
) -> tuple[bytes, dict[str, Any]]:
    """The graph in int8, and its entry in the manifest.

    Args:
        graph: in fp32.
        exported: the same, ready to be asked.
        dataset: to calibrate, compare and evaluate on.
        training: int64 [N], indices of the images that it was trained on.

    Raises:
        ExportError: int8 costs more of the validation accuracy than `INT8_LIMIT`, and more than two images.
    """
    chosen = np.random.RandomState(0).permutation(training)[:CALIBRATION_IMAGES]
    content = to_int8(graph, dataset.train.images[chosen].numpy())
    predictor = onnx_predictor(content, CPU)
    before, after = (evaluate(each, dataset, "validation") for each in (exported, predictor))
    lost = before["correct"] - after["correct"]
    if lost > max(2, INT8_LIMIT * before["images"]):
        raise ExportError(
            f"int8 is right on {after['correct']} of {after['images']} validation images, fp32 on {before['correct']} "
            f"(limit: {INT8_LIMIT:.0%} less); nothing was exported; train the run longer, or export another"
        )
    return content, _variant("model.int8.onnx", content, predictor, dataset) | {"calibration_images": len(chosen)}


def _check_data(description: dict[str, Any], dataset: Dataset, run: RunFolder) -> None:
    trained_on = description["data"]
    if trained_on["fingerprint"] != dataset.fingerprint:
        raise ExportError(
            f"{run.path} was trained on {trained_on['name']} (fingerprint {trained_on['fingerprint'][:12]}), but "
            f"--data is {dataset.name} ({dataset.fingerprint[:12]}); export with the data of its training"
        )


def fingerprint_of_weights(state: dict[str, Tensor]) -> str:
    """SHA-256 over names and values of a network's tensors, in hexadecimal."""
    digest = hashlib.sha256()
    for name, tensor in state.items():
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def export_run(run: RunFolder, dataset: Dataset, target: Path) -> dict[str, Any]:
    """Exports the best weights of a finished run. Returns the manifest.

    Raises:
        ExportError: the run is not finished or of other data, the graph differs from torch, or it cannot be written.
            What `target` held is untouched.
        RunError, EvaluationError: the run is damaged, or its classes are not the data's.
    """
    description = run.description()
    if not run.is_finished():
        raise ExportError(
            f"{run.path}: not trained to the end; go on with: "
            f"python -m cifar_core.train {description['recipe']['name']} --resume"
        )
    _check_data(description, dataset, run)
    checkpoint = load_checkpoint(run.best)
    reference = torch_predictor(checkpoint, CPU)
    check_classes(reference, dataset)
    recipe, seed = description["recipe"], description["seed"]
    identity = {
        "schema_version": SCHEMA_VERSION,
        "model_version": f"{recipe['name']}-{seed}-{fingerprint_of_weights(checkpoint['model'])[:8]}",
        "classes": list(dataset.classes),
        "data": description["data"],
        "libraries": {name: version(name) for name in ("torch", "onnx", "onnxscript", "onnxruntime", "numpy")},
    }
    current = current_export(target, identity)
    if current is not None:
        return current
    held_out, _ = choose_split(reference, dataset, "validation")
    temperature = fit_temperature(predict_all(reference, held_out.images.numpy())[0], held_out.labels.numpy())
    metadata = {
        "model_version": identity["model_version"],
        "classes": json.dumps(identity["classes"]),
        "validation_images": str(recipe["validation_images"]),
        "split_seed": str(recipe["split_seed"]),
        "trained_on": dataset.fingerprint,
    }
    graph = to_onnx(build_model(checkpoint), metadata, temperature)
    exported = onnx_predictor(graph, CPU)
    parity = measure_parity(reference, exported, dataset, temperature)
    variant = _variant("model.onnx", graph, exported, dataset)
    training, _ = split(len(dataset.train), recipe["validation_images"], recipe["split_seed"])
    graph_int8, variant_int8 = quantised(graph, exported, dataset, training.numpy())
    manifest = identity | {
        "variants": {"fp32": variant, "int8": variant_int8},
        "recipe": recipe,
        "seed": seed,
        "epoch": checkpoint["epoch"],
        "precision": description["precision"],
        "validation_accuracy": checkpoint["validation_accuracy"],
        "temperature": temperature,
        "parity": parity,
    }
    files = {variant["file"]: graph, variant_int8["file"]: graph_int8, "manifest.json": to_json(manifest)}
    publish(target, files)
    return manifest


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m cifar_core.export", description="Exports a finished run as ONNX, checked against torch."
    )
    parser.add_argument(
        "--run",
        type=Path,
        metavar="DIR",
        help="a run folder; default: the finished one of best validation accuracy",
    )
    parser.add_argument(
        "--runs",
        type=Path,
        metavar="DIR",
        help="where run folders lie; default: runs (synthetic/runs for generated data)",
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="default: exported (synthetic/exported for generated data)"
    )
    add_data_argument(parser)
    arguments = parser.parse_args()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    dataset = load_dataset(arguments.data)
    run = RunFolder(arguments.run) if arguments.run else pick_run(arguments.runs or default_place(dataset.kind, "runs"))
    target = arguments.output or default_place(dataset.kind, "exported")
    manifest = export_run(run, dataset, target)
    variants, parity = manifest["variants"], manifest["parity"]
    batches = ", ".join(map(str, parity["batch_sizes"]))
    print(
        f"{target}: {manifest['model_version']}, validation accuracy {manifest['validation_accuracy']:.2%}, "
        f"test accuracy {variants['fp32']['test_accuracy']:.2%} (int8 {variants['int8']['test_accuracy']:.2%}) "
        f"on {manifest['data']['name']}\n"
        f"parity with torch on {parity['images']:,} images, batches of {batches}: probabilities "
        f"within {parity['max_abs_difference_of_probabilities']:.1e}, {parity['differing_classes']} differing classes"
    )
    return 0


if __name__ == "__main__":
    run_command(main)
