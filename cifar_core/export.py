"""Exports a finished run: ONNX graphs in fp32 and int8, and the manifest that describes them.

    python -m cifar_core.export [--run runs/deep/0]

The graph includes everything between the pixels that a decoder returns and the probabilities, so that training and
serving cannot differ. It is compared with torch on real images before anything in the target folder changes.
"""

import argparse
import hashlib
import json
import logging
import warnings
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from cifar_core.calibration import fit_temperature
from cifar_core.data import Dataset, add_data_argument, load_dataset, split
from cifar_core.device import CPU
from cifar_core.errors import CifarError, program_name, run_command
from cifar_core.evaluate import check_classes, evaluate
from cifar_core.images import IMAGE_SIZE
from cifar_core.manifest import FILE_NAME, SCHEMA_VERSION, Data, Manifest, ManifestError, Variant, read_manifest
from cifar_core.models import Network, fuse_batch_norm
from cifar_core.parity import check_int8, compare_on, measure_parity
from cifar_core.predictors import Predictor, UInt8, build_model, onnx_predictor, torch_predictor
from cifar_core.publish import VARIANT_FILES, is_intact, publish
from cifar_core.quantise import CALIBRATION_IMAGES, to_int8
from cifar_core.recipes import Recipe, read_recipe
from cifar_core.run_folder import RunFolder, best_epoch, default_folder, finished_runs, load_checkpoint


class ExportError(CifarError):
    """The export failed. The target folder is unchanged."""


class Classifier(nn.Module):
    """The exported graph: uint8 [N, 32, 32, 3] -> logits and probabilities, float32 [N, classes] each.

    Args:
        network: maps images to logits.
        temperature: the logits are divided by this number before the softmax; see `calibration`.
    """

    def __init__(self, network: nn.Module, temperature: float = 1.0) -> None:
        super().__init__()
        self.network = network
        self.temperature = temperature

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.network(images)
        return logits, torch.softmax(logits / self.temperature, 1)


def to_onnx(network: Network, metadata: Mapping[str, str], temperature: float = 1.0) -> bytes:
    """The ONNX graph of a network, with a dynamic batch size and without batch normalisation.

    Args:
        network: uint8 [N, 32, 32, 3] -> logits, on the CPU; it is put into evaluation mode.
        metadata: written into the file.
        temperature: the logits are divided by this number before the softmax.

    Raises:
        ExportError: torch could not export the network.
    """
    # Two images and not one, because the exporter treats a dimension of 1 as constant.
    example = torch.zeros(2, IMAGE_SIZE, IMAGE_SIZE, 3, dtype=torch.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter uses deprecated functions of its own
        program = torch.onnx.export(
            Classifier(fuse_batch_norm(network), temperature).eval(),
            (example,),
            input_names=["images"],
            output_names=["logits", "probabilities"],
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
            dynamo=True,
            optimize=True,
            verbose=False,
        )
    if program is None:
        raise ExportError("torch.onnx.export returned no graph; use the versions in constraints.txt")
    model = program.model_proto
    _remove_source_paths(model)
    onnx.helper.set_model_props(model, dict(metadata))
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString())


def _remove_source_paths(model: onnx.ModelProto) -> None:
    """Removes the source locations that the exporter records for each node, with paths of this machine."""
    for node in model.graph.node:
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info, *model.graph.initializer):
        value.ClearField("metadata_props")
    model.graph.ClearField("metadata_props")


def pick_run(runs: Path) -> RunFolder:
    """The finished run with the best validation accuracy, of any recipe. Test accuracy plays no part.

    Raises:
        ExportError: There is no finished run.
    """
    finished = finished_runs(runs)
    if not finished:
        raise ExportError(f"{runs}: there is no finished run in this folder; train one with: make train")
    return max(finished, key=lambda run: float(best_epoch(run.history())["validation_accuracy"]))


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names and values of a network's tensors, in hexadecimal."""
    digest = hashlib.sha256()
    for name, tensor in state.items():
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def export_run(run: RunFolder, dataset: Dataset, target: Path) -> Manifest:
    """Exports the best weights of a finished run, unless the folder holds this export already. Returns the manifest.

    Args:
        run: the run.
        dataset: the data that it was trained on.
        target: the folder of the export.

    Raises:
        ExportError: The run is not finished, or was trained on other data.
        ParityError: The graph differs from torch, or int8 is too inaccurate.
        PublishError: The folder cannot be written.
        RunError, PredictorError, EvaluationError: The run is damaged, or its classes are not those of the data.
            In all cases the target folder is unchanged.
    """
    description = run.description()
    recipe = read_recipe(description["recipe"])
    _check_run(run, description, recipe, dataset)
    checkpoint = load_checkpoint(run.best)
    reference = torch_predictor(checkpoint, CPU)
    check_classes(reference, dataset)
    identity = _identity(checkpoint, description, recipe)
    current = _current_export(target, identity)
    if current is not None:
        return current
    comparison = compare_on(reference, dataset)
    temperature = fit_temperature(comparison.validation_logits, comparison.labels)
    graph = to_onnx(build_model(checkpoint), _graph_metadata(identity, recipe), temperature)
    exported = onnx_predictor(graph, CPU)
    parity, fp32_logits = measure_parity(comparison, exported, temperature)
    calibration_images = _calibration_images(dataset, recipe)
    int8_graph = to_int8(graph, calibration_images)
    int8 = onnx_predictor(int8_graph, CPU)
    check_int8(comparison, fp32_logits, int8)
    manifest = Manifest(
        **identity,
        variants={
            "fp32": _variant("fp32", graph, exported, dataset),
            "int8": _variant("int8", int8_graph, int8, dataset, calibration_images=len(calibration_images)),
        },
        recipe=recipe.values(),
        seed=description["seed"],
        epoch=checkpoint["epoch"],
        precision=description["precision"],
        validation_accuracy=checkpoint["validation_accuracy"],
        temperature=temperature,
        parity=parity,
    )
    graphs = {VARIANT_FILES["fp32"]: graph, VARIANT_FILES["int8"]: int8_graph}
    publish(target, graphs | {FILE_NAME: manifest.to_json()})
    return manifest


def _check_run(run: RunFolder, description: dict[str, Any], recipe: Recipe, dataset: Dataset) -> None:
    if not run.is_finished():
        raise ExportError(
            f"{run.path}: this run is not finished; continue it with: python -m cifar_core.train {recipe.name} --resume"
        )
    trained_on = description["data"]
    if trained_on["fingerprint"] != dataset.fingerprint:
        raise ExportError(
            f"{run.path} was trained on {trained_on['name']} (fingerprint {trained_on['fingerprint'][:12]}), but "
            f"--data is {dataset.name} ({dataset.fingerprint[:12]}); export it with the data that it was trained on"
        )


def _identity(checkpoint: dict[str, Any], description: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """The fields of the manifest that two exports of the same weights, data and libraries share."""
    digest = weights_digest(checkpoint["model"])
    return {
        "schema_version": SCHEMA_VERSION,
        "model_version": f"{recipe.name}-{description['seed']}-{digest[:8]}",
        "classes": tuple(checkpoint["classes"]),
        "data": Data(**description["data"]),
        "libraries": {name: version(name) for name in ("torch", "onnx", "onnxscript", "onnxruntime", "numpy")},
    }


def _current_export(target: Path, identity: dict[str, Any]) -> Manifest | None:
    """The manifest in a folder, if it is a complete and intact export of the same weights, data and libraries."""
    try:
        manifest = read_manifest(target)
    except ManifestError:  # missing, damaged or of another version: it will be written
        return None
    same = all(getattr(manifest, field) == value for field, value in identity.items())
    complete = manifest.variants.keys() == VARIANT_FILES.keys() and manifest.temperature is not None
    return manifest if same and complete and is_intact(target, manifest) else None


def _graph_metadata(identity: dict[str, Any], recipe: Recipe) -> dict[str, str]:
    return {
        "model_version": identity["model_version"],
        "classes": json.dumps(identity["classes"]),
        "validation_images": str(recipe.validation_images),
        "split_seed": str(recipe.split_seed),
        "trained_on": identity["data"].fingerprint,
    }


def _calibration_images(dataset: Dataset, recipe: Recipe) -> UInt8:
    """A random sample of the images that were trained on, the same in every export."""
    train_indices, _ = split(len(dataset.train), recipe.validation_images, recipe.split_seed)
    chosen = np.random.RandomState(0).permutation(train_indices.numpy())[:CALIBRATION_IMAGES]
    return dataset.train.images[chosen].numpy()


def _variant(
    name: str, graph: bytes, predictor: Predictor, dataset: Dataset, calibration_images: int | None = None
) -> Variant:
    """A graph's entry in the manifest, with its accuracy and calibration on the test images."""
    result = evaluate(predictor, dataset, "test")
    measured: dict[str, Any] = {
        "test_images": result["images"],
        "test_loss": result["loss"],
        "test_loss_before": result["calibration"]["loss_before"],
        "test_ece": result["calibration"]["ece"],
        "test_ece_before": result["calibration"]["ece_before"],
    }
    if calibration_images is not None:
        measured["calibration_images"] = calibration_images
    return Variant(
        file=VARIANT_FILES[name],
        sha256=hashlib.sha256(graph).hexdigest(),
        test_accuracy=result["accuracy"],
        **measured,
    )


def _summary(target: Path, manifest: Manifest) -> str:
    accuracies = {name: variant.test_accuracy for name, variant in manifest.variants.items()}
    text = (
        f"{target}: {manifest.model_version}, validation accuracy {manifest.validation_accuracy:.2%}, "
        f"test accuracy {accuracies['fp32']:.2%} (int8 {accuracies['int8']:.2%}) on {manifest.data.name}"
    )
    parity = manifest.parity
    if parity is not None:
        batches = ", ".join(map(str, parity.batch_sizes))
        text += (
            f"\nparity with torch on {parity.images:,} images, in batches of {batches}: probabilities differ by "
            f"at most {parity.max_abs_difference_of_probabilities:.1e}, {parity.differing_classes} classes differ"
        )
    return text


def main() -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog=program_name("cifar_core.export"),
        description="Exports a finished run as ONNX, in fp32 and int8, and compares the graph with torch.",
    )
    parser.add_argument(
        "--run",
        type=Path,
        metavar="DIR",
        help="run folder to export; default: the finished run with the best validation accuracy",
    )
    parser.add_argument(
        "--runs",
        type=Path,
        metavar="DIR",
        help="folder of runs to choose from without --run; default: runs (synthetic/runs for synthetic data)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="folder to write the export to; default: exported (synthetic/exported for synthetic data)",
    )
    add_data_argument(parser)
    arguments = parser.parse_args()
    logging.basicConfig(format="%(levelname)s: %(message)s")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    dataset = load_dataset(arguments.data)
    runs = arguments.runs or default_folder(dataset.kind, "runs")
    run = RunFolder(arguments.run) if arguments.run else pick_run(runs)
    target = arguments.output or default_folder(dataset.kind, "exported")
    print(_summary(target, export_run(run, dataset, target)))
    return 0


if __name__ == "__main__":
    run_command(main)
