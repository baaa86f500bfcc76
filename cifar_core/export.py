"""Exports a finished run: ONNX graphs in fp32 and int8, and the manifest that describes them.

    python -m cifar_core.export [--run runs/deep/0]

The graph includes everything between the pixels that a decoder returns and the probabilities, so that training and
serving cannot differ. It is compared with torch on real images before anything in the target folder changes.
"""

import argparse
import contextlib
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
import onnxruntime
import torch

from cifar_core.calibration import (
    PRIOR_DEVIATION,
    SMALLEST_SAMPLE,
    UNCALIBRATED,
    caution,
    choose_calibration,
)
from cifar_core.calibration_graph import add_calibration
from cifar_core.data import Dataset, add_data_argument, load_dataset
from cifar_core.device import CPU
from cifar_core.errors import program_name, run_command
from cifar_core.evaluate import check_classes, choose_split, evaluate, manifest_fields, manifest_scale
from cifar_core.export_source import ExportError, check_run, check_weights, pick_run
from cifar_core.files import path_option
from cifar_core.int8 import WEIGHT_BITS
from cifar_core.manifest import (
    FILE_NAME,
    SCHEMA_VERSION,
    Data,
    Manifest,
    ManifestError,
    Variant,
    read_manifest,
)
from cifar_core.models import Network, fuse_batch_norm
from cifar_core.parity import Comparison, check_int8, compare_on, measure_parity
from cifar_core.pixels import IMAGE_SIZE
from cifar_core.predictors import Floats, Predictor, UInt8, build_model, onnx_predictor, torch_predictor
from cifar_core.publish import VARIANT_FILES, check_target, is_intact, publish, warn_if_unmeasured
from cifar_core.quantise import CALIBRATION_IMAGES, to_int8
from cifar_core.recipe import Recipe
from cifar_core.resuming import saved_recipe
from cifar_core.run_folder import RunFolder, default_folder, load_checkpoint, weights_digest

logger = logging.getLogger(__name__)


def to_onnx(network: Network, metadata: Mapping[str, str]) -> bytes:
    """The ONNX graph of a network up to its logits, with a dynamic batch size and without batch normalisation.

    Args:
        network: uint8 [N, 32, 32, 3] -> logits, on the CPU; it is put into evaluation mode.
        metadata: written into the file.

    Raises:
        ExportError: torch could not export the network.
    """
    # Two images and not one, because the exporter treats a dimension of 1 as constant.
    example = torch.zeros(2, IMAGE_SIZE, IMAGE_SIZE, 3, dtype=torch.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter uses deprecated functions of its own
        program = torch.onnx.export(
            _Named(fuse_batch_norm(network)).eval(),
            (example,),
            input_names=["images"],
            output_names=["logits"],
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


class _Named(torch.nn.Module):
    """Gives the tensors of a network in a graph the prefix `network.`, by which `initial_weights` finds them."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network(images)  # type: ignore[no-any-return]


def _remove_source_paths(model: onnx.ModelProto) -> None:
    """Removes the source locations that the exporter records for each node, with paths of this machine."""
    for node in model.graph.node:
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info, *model.graph.initializer):
        value.ClearField("metadata_props")
    model.graph.ClearField("metadata_props")


def export_run(run: RunFolder, dataset: Dataset, target: Path, data: str | None = None) -> Manifest:
    """Exports the best weights of a finished run, unless the folder holds this export already. Returns the manifest.

    Args:
        run: the run.
        dataset: the data that it was trained on.
        target: the folder of the export.
        data: the value of `--data` that names the data, for messages.

    Raises:
        ExportError: The run is not finished, was trained on other data, or holds the weights of another run.
        ParityError: The graph differs from torch, or int8 is too inaccurate.
        PublishError: The folder must not be replaced or cannot be written, see `publish.check_target`.
        RunError, PredictorError, EvaluationError: The run is damaged, or its classes are not those of the data.
            In all cases the target folder is unchanged.
    """
    check_target(target)
    description = run.description()
    recipe = saved_recipe(run, description)
    check_run(run, description, dataset, data)
    checkpoint = load_checkpoint(run.best)
    check_weights(run, checkpoint, description)
    reference = torch_predictor(checkpoint, CPU)
    check_classes(reference, dataset)
    identity = _identity(checkpoint, description, recipe)
    current = _current_export(target, identity)
    if current is not None:
        return current
    comparison = compare_on(reference, dataset)
    calibration = choose_calibration(comparison.validation_logits, comparison.labels)
    network = to_onnx(build_model(checkpoint), _graph_metadata(identity, recipe))
    graph = add_calibration(network, calibration)
    exported = onnx_predictor(graph, CPU)
    parity, fp32_logits = measure_parity(comparison, exported, calibration)
    chose_epoch = recipe.weights == "best"
    if chose_epoch:
        logger.warning(
            "%s keeps the epoch with the best validation accuracy, and the probabilities were calibrated on the same "
            "validation images; for a calibration on images that chose nothing, train with --set weights=last",
            recipe.name,
        )
    note = caution(len(comparison.labels))
    if note is not None:
        logger.warning("%s", note)
    scale = manifest_scale(calibration, len(comparison.labels), chose_epoch)
    int8_graph, int8 = quantised(network, exported, comparison, fp32_logits, dataset, chose_epoch)
    manifest = Manifest(
        **identity,
        variants={"fp32": _variant("fp32", graph, exported, dataset, {"calibration": scale}), "int8": int8},
        recipe=recipe.values(),
        seed=description["seed"],
        epoch=checkpoint["epoch"],
        precision=description["precision"],
        validation_accuracy=checkpoint["validation_accuracy"],
        parity=parity,
    )
    with contextlib.suppress(ManifestError):  # there is no previous export, or a damaged one
        warn_if_unmeasured(read_manifest(target).variants.values(), manifest.variants.values(), target)
    graphs = {VARIANT_FILES["fp32"]: graph, VARIANT_FILES["int8"]: int8_graph}
    publish(target, graphs | {FILE_NAME: manifest.to_json()})
    return manifest


def quantised(
    network: bytes, fp32: Predictor, comparison: Comparison, fp32_logits: Floats, dataset: Dataset, chose_epoch: bool
) -> tuple[bytes, Variant]:
    """The int8 variant of an export: its graph, and its entry in the manifest.

    Args:
        network: the fp32 graph up to its logits.
        fp32: the fp32 graph with its calibration.
        comparison: the validation images.
        fp32_logits: the logits of `fp32` on them.
        dataset: the data that the network was trained on.
        chose_epoch: whether the validation images also chose the epoch.

    Raises:
        ParityError: int8 classifies too few validation images correctly.
    """
    images = _range_images(fp32, dataset)
    int8_network = to_int8(network, images)
    # Its own calibration needs its logits, which any calibration leaves unchanged.
    uncalibrated = onnx_predictor(add_calibration(int8_network, UNCALIBRATED), CPU)
    calibration = choose_calibration(check_int8(comparison, fp32_logits, uncalibrated), comparison.labels)
    graph = add_calibration(int8_network, calibration)
    scale = manifest_scale(calibration, len(comparison.labels), chose_epoch)
    about = {"calibration": scale, "calibration_images": len(images), "weight_bits": WEIGHT_BITS}
    return graph, _variant("int8", graph, onnx_predictor(graph, CPU), dataset, about)


def _identity(checkpoint: dict[str, Any], description: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """The fields of the manifest that two exports of the same weights, data and libraries share."""
    digest = weights_digest(checkpoint["model"])
    return {
        "schema_version": SCHEMA_VERSION,
        "model_version": f"{recipe.name}-{description['seed']}-{digest[:8]}",
        "classes": tuple(checkpoint["classes"]),
        "data": Data(**description["data"]),
        "libraries": {name: version(name) for name in ("torch", "onnx", "onnxscript", "numpy")}
        # Its package is called onnxruntime, onnxruntime-gpu or onnxruntime-openvino.
        | {"onnxruntime": onnxruntime.__version__},
    }


def _current_export(target: Path, identity: dict[str, Any]) -> Manifest | None:
    """The manifest in a folder, if it is a complete and intact export of the same weights, data and libraries."""
    try:
        manifest = read_manifest(target)
    except ManifestError:  # missing, damaged or of another version: it will be written
        return None
    same = all(getattr(manifest, field) == value for field, value in identity.items())
    calibrated = all(_is_calibrated(variant) for variant in manifest.variants.values())
    complete = manifest.variants.keys() >= VARIANT_FILES.keys() and calibrated and manifest.parity is not None
    complete = complete and manifest.variants["int8"].weight_bits == WEIGHT_BITS
    return manifest if same and complete and is_intact(target, manifest) else None


def _is_calibrated(variant: Variant) -> bool:
    """Whether a variant has the calibration of this version. Earlier ones fitted it to few images without caution."""
    scale = variant.calibration
    return scale is not None and (scale.images >= SMALLEST_SAMPLE or scale.prior_deviation == PRIOR_DEVIATION)


def _graph_metadata(identity: dict[str, Any], recipe: Recipe) -> dict[str, str]:
    return {
        "model_version": identity["model_version"],
        "classes": json.dumps(identity["classes"]),
        "validation_images": str(recipe.validation_images),
        "split_seed": str(recipe.split_seed),
        "trained_on": identity["data"].fingerprint,
    }


def _range_images(predictor: Predictor, dataset: Dataset) -> UInt8:
    """A random sample of the images that a network was trained on, the same in every export."""
    held_out = choose_split(predictor, dataset, "validation")[1]
    train_indices = np.setdiff1d(np.arange(len(dataset.train)), held_out)
    chosen = np.random.RandomState(0).permutation(train_indices)[:CALIBRATION_IMAGES]
    return dataset.train.images[chosen].numpy()


def _variant(name: str, graph: bytes, predictor: Predictor, dataset: Dataset, about: dict[str, Any]) -> Variant:
    """A graph's entry in the manifest: its measurements on the test images, and the fields `about`."""
    about = manifest_fields(evaluate(predictor, dataset, "test")) | about
    return Variant(file=VARIANT_FILES[name], sha256=hashlib.sha256(graph).hexdigest(), **about)


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
        type=path_option,
        metavar="DIR",
        help="run folder to export; default: the finished run with the best accuracy on held-out images that all runs "
        "have in common",
    )
    parser.add_argument(
        "--runs",
        type=path_option,
        metavar="DIR",
        help="folder of runs to choose from without --run; default: runs (synthetic/runs for synthetic data)",
    )
    parser.add_argument(
        "--output",
        type=path_option,
        metavar="DIR",
        help="folder to write the export to; default: exported (synthetic/exported for synthetic data)",
    )
    add_data_argument(parser)
    arguments = parser.parse_args()
    logging.basicConfig(format="%(levelname)s: %(message)s")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    if arguments.output:  # before the data is read, which may take minutes
        check_target(arguments.output)
    dataset = load_dataset(arguments.data)
    target = arguments.output or default_folder(dataset.kind, "exported")
    check_target(target)
    runs = arguments.runs or default_folder(dataset.kind, "runs")
    run = RunFolder(arguments.run) if arguments.run else pick_run(runs, dataset)
    print(_summary(target, export_run(run, dataset, target, arguments.data)))
    return 0


if __name__ == "__main__":
    run_command(main)
