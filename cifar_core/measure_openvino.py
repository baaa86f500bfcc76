"""Measures an export as OpenVINO computes it, and writes the measurements to its manifest.

    python -m cifar_core.measure_openvino [--export exported]

The server computes with OpenVINO (`--device openvino`) only what was measured: fp32, bf16 and int8 differ from what
onnxruntime computes, bf16 most. Needs onnxruntime-openvino: `make setup PROCESSOR=openvino`.
"""

import argparse
import logging
from pathlib import Path

from cifar_core.data import Dataset, add_data_argument, load_dataset
from cifar_core.device import CPU
from cifar_core.errors import program_name, run_command
from cifar_core.evaluate import check_classes, choose_split, evaluate, manifest_fields
from cifar_core.int8 import EARLIER_WEIGHT_BITS
from cifar_core.manifest import FILE_NAME, OPENVINO_PREFIX, Manifest, Variant
from cifar_core.openvino import OpenVinoError, Precision, check_weight_bits
from cifar_core.parity import INT8_IMAGES, INT8_LIMIT, ParityError
from cifar_core.predictors import Predictor, onnx_predictor, openvino_predictor, predict_all
from cifar_core.processor import has_bf16, processor_name
from cifar_core.publish import add_export_argument, read_export, replace
from cifar_core.run_folder import default_folder

logger = logging.getLogger(__name__)

MAX_THREADS = 1024
PRECISIONS: dict[str, tuple[str, Precision]] = {
    "fp32": ("fp32", "fp32"),
    "bf16": ("fp32", "bf16"),
    "int8": ("int8", "fp32"),
}
"""By name of the variant: the variant whose file is computed, and the precision."""


def measure(folder: Path, dataset: Dataset, threads: int) -> Manifest:
    """Measures all variants on the test images and adds them to the manifest of the export. Returns the manifest.

    Args:
        folder: the export.
        dataset: the data that it was trained on.
        threads: number of threads of OpenVINO.

    Raises:
        ManifestError: There is no export in the folder.
        PublishError: The export is damaged, was trained on other data or replaced meanwhile, or its folder cannot be
            written.
        OpenVinoError: OpenVINO is not installed, or cannot compute the graphs on this machine.
        ParityError: OpenVINO classifies too few validation images correctly. The folder is unchanged.
        EvaluationError: The classes of model and data differ.
    """
    manifest, read = read_export(folder, dataset)
    variants = {name: each for name, each in manifest.variants.items() if each.openvino_precision is None}
    measured: dict[str, Variant] = {}
    for name, (source, precision) in PRECISIONS.items():
        if source not in variants:
            continue
        variant = variants[source]
        obstacle = _obstacle(name, variant)
        if obstacle:
            entry = "has no entry"
            earlier = manifest.variants.get(OPENVINO_PREFIX + name)
            if earlier is not None and earlier.sha256 == variant.sha256:
                measured[OPENVINO_PREFIX + name] = earlier
                entry = f"keeps its entry, measured with {earlier.measured_with}"
            logger.warning("%s is not measured, and %s: %s", name, entry, obstacle)
            continue
        predictor = openvino_predictor(read[variant.file], threads, precision)
        check_classes(predictor, dataset)
        _check_validation(name, onnx_predictor(read[variant.file], CPU), predictor, dataset)
        fields = manifest_fields(evaluate(predictor, dataset, "test"))
        fields |= {"openvino_precision": precision, "measured_with": _environment()}
        measured[OPENVINO_PREFIX + name] = Variant(**{**variant.model_dump(exclude_unset=True), **fields})
    manifest = manifest.model_copy(update={"variants": variants | measured})
    replace(folder, read, {FILE_NAME: manifest.to_json()})
    return manifest


def _obstacle(name: str, variant: Variant) -> str | None:
    """Why this processor cannot compute a variant with OpenVINO; None if it can."""
    if name == "bf16" and not has_bf16():
        return "this processor does not compute in bf16"
    if name == "int8":
        bits = variant.weight_bits or EARLIER_WEIGHT_BITS
        try:
            check_weight_bits(bits)
        except OpenVinoError:
            return f"sums of products of its weights of {bits} bits overflow here; run cifar_core.requantise first"
    return None


def _environment() -> str:
    import onnxruntime

    return f"onnxruntime-openvino {onnxruntime.__version__}, {processor_name()}"


def _check_validation(name: str, reference: Predictor, predictor: Predictor, dataset: Dataset) -> None:
    held_out, _ = choose_split(reference, dataset, "validation")
    images, labels = held_out.images.numpy(), held_out.labels.numpy()
    before, after = (int((predict_all(each, images)[0].argmax(1) == labels).sum()) for each in (reference, predictor))
    if before - after > max(INT8_IMAGES, INT8_LIMIT * len(labels)):
        raise ParityError(
            f"{name}: OpenVINO classifies {after} of {len(labels)} validation images correctly, onnxruntime {before} "
            f"(allowed loss: {INT8_LIMIT:.0%}); the manifest is unchanged; report this with the model of the processor"
        )


def _threads(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= MAX_THREADS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to {MAX_THREADS}")
    return int(text)


def main() -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog=program_name("cifar_core.measure_openvino"),
        description="Measures an export as OpenVINO computes it, and writes the measurements to its manifest.",
    )
    add_export_argument(parser)
    parser.add_argument("--threads", type=_threads, default=1, help="number of threads; default: %(default)s")
    add_data_argument(parser)
    arguments = parser.parse_args()
    logging.basicConfig(format="%(levelname)s: %(message)s")
    dataset = load_dataset(arguments.data)
    folder = arguments.export or default_folder(dataset.kind, "exported")
    manifest = measure(folder, dataset, arguments.threads)
    for name, variant in manifest.variants.items():
        print(f"{name}: test accuracy {variant.test_accuracy:.2%} on {variant.test_images:,} images of {dataset.name}")
    return 0


if __name__ == "__main__":
    run_command(main)
