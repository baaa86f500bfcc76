"""Quantises the int8 variant of an export anew, from its fp32 graph.

    python -m cifar_core.requantise [--export exported]

For exports of earlier versions, whose int8 weights have 8 bits, if their run is not at hand: processors without VNNI
compute such weights with slower instructions. The fp32 graph stays as it is. A measurement of int8 with OpenVINO is
removed from the manifest, because it holds for the previous graph.
"""

import argparse
import logging
from pathlib import Path

from cifar_core.calibration import caution
from cifar_core.calibration_graph import without_calibration
from cifar_core.data import Dataset, add_data_argument, load_dataset
from cifar_core.device import CPU
from cifar_core.errors import program_name, run_command
from cifar_core.evaluate import check_classes
from cifar_core.export import quantised
from cifar_core.manifest import FILE_NAME, Manifest, read_manifest
from cifar_core.parity import compare_on
from cifar_core.predictors import onnx_predictor
from cifar_core.publish import VARIANT_FILES, add_export_argument, read_export, replace, warn_if_unmeasured
from cifar_core.run_folder import default_folder

logger = logging.getLogger(__name__)


def requantise(folder: Path, dataset: Dataset) -> Manifest:
    """Replaces the int8 variant by the one that `export` makes of the same fp32 graph. Returns the manifest.

    Args:
        folder: the export.
        dataset: the data that it was trained on.

    Raises:
        ManifestError: There is no export in the folder, or it has no fp32 variant.
        PublishError: The export is damaged, was trained on other data or replaced meanwhile, or its folder cannot be
            written.
        PredictorError: The fp32 graph is not one of this project.
        EvaluationError: The classes of model and data differ.
        ParityError: int8 classifies too few validation images correctly. The folder is unchanged in all these cases.
    """
    manifest, read = read_export(folder, dataset)
    graph = read[manifest.variant("fp32").file]
    fp32 = onnx_predictor(graph, CPU)
    check_classes(fp32, dataset)
    comparison = compare_on(fp32, dataset)
    note = caution(len(comparison.labels))
    if note is not None:
        logger.warning("%s", note)
    network = without_calibration(graph)
    int8_graph, int8 = quantised(network, fp32, comparison, comparison.validation_logits, dataset, manifest.chose_epoch)
    previous = manifest.variants.get("int8")
    # Entries of the previous graph, such as that with OpenVINO, do not hold any more.
    replaced = {VARIANT_FILES["int8"], *([previous.file] if previous else [])}
    kept = {name: each for name, each in manifest.variants.items() if each.file not in replaced}
    warn_if_unmeasured(manifest.variants.values(), kept.values(), folder)
    manifest = manifest.model_copy(update={"variants": {**kept, "int8": int8}})
    others = {name: content for name, content in read.items() if name not in replaced}
    replace(folder, others, {VARIANT_FILES["int8"]: int8_graph, FILE_NAME: manifest.to_json()})
    return manifest


def main() -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog=program_name("cifar_core.requantise"),
        description="Quantises the int8 variant of an export anew, from its fp32 graph.",
    )
    add_export_argument(parser)
    add_data_argument(parser)
    arguments = parser.parse_args()
    logging.basicConfig(format="%(levelname)s: %(message)s")
    dataset = load_dataset(arguments.data)
    folder = arguments.export or default_folder(dataset.kind, "exported")
    before = read_manifest(folder).variants
    after = requantise(folder, dataset).variants["int8"]
    accuracy = f"{before['int8'].test_accuracy:.2%}" if "int8" in before else "no variant"
    print(f"int8: test accuracy {after.test_accuracy:.2%} on {dataset.name}, {accuracy} before")
    return 0


if __name__ == "__main__":
    run_command(main)
