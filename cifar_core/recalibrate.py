"""Fits the calibration of an export anew, on the held-out images of the data that it was trained on.

    python -m cifar_core.recalibrate [--export exported]

For exports of earlier versions, whose probabilities have a temperature only, and whose run is not at hand. The network
and its logits stay the same, bit for bit; so do the predicted classes. Measurements with OpenVINO are removed from the
manifest, because they hold for the previous probabilities, and so is the comparison with torch.
"""

import argparse
import hashlib
from pathlib import Path

import numpy as np

from cifar_core.calibration import choose_calibration
from cifar_core.calibration_graph import add_calibration, without_calibration
from cifar_core.data import Dataset, add_data_argument, load_dataset
from cifar_core.device import CPU
from cifar_core.errors import program_name, run_command
from cifar_core.evaluate import choose_split, evaluate, manifest_fields
from cifar_core.manifest import FILE_NAME, CalibrationScale, Manifest, Variant, read_manifest
from cifar_core.parity import PARITY_LIMIT, ParityError
from cifar_core.predictors import onnx_predictor, predict_all
from cifar_core.publish import add_export_argument, read_export, replace
from cifar_core.run_folder import default_folder


def recalibrate(folder: Path, dataset: Dataset) -> Manifest:
    """Replaces the calibration of all variants and measures them on the test images. Returns the manifest.

    Raises:
        ManifestError: There is no export in the folder.
        PublishError: The export is damaged, was trained on other data or replaced meanwhile, or its folder cannot be
            written.
        ParityError: The new graph differs from what it should compute.
    """
    manifest, read = read_export(folder, dataset)
    variants: dict[str, Variant] = {}
    files: dict[str, bytes] = {}
    for name, variant in manifest.variants.items():
        if variant.openvino_precision is None:
            files[variant.file], variants[name] = _recalibrated(read[variant.file], variant, manifest, dataset)
    # The parity was measured on the previous probabilities, and there is no network in torch to repeat it.
    dropped = {"temperature", "variants", "parity"}
    kept = {field: getattr(manifest, field) for field in manifest.model_fields_set - dropped}
    manifest = Manifest(**kept, variants=variants)
    replace(folder, read, files | {FILE_NAME: manifest.to_json()})
    return manifest


def _recalibrated(before: bytes, variant: Variant, manifest: Manifest, dataset: Dataset) -> tuple[bytes, Variant]:
    predictor = onnx_predictor(before, CPU)
    held_out, _ = choose_split(predictor, dataset, "validation")
    images, labels = held_out.images.numpy(), held_out.labels.numpy()
    logits, _ = predict_all(predictor, images)
    calibration = choose_calibration(logits, labels)
    graph = add_calibration(without_calibration(before), calibration)
    exported = onnx_predictor(graph, CPU)
    new_logits, probabilities = predict_all(exported, images)
    difference = float(np.abs(probabilities - calibration.probabilities(logits)).max())
    if not np.array_equal(new_logits, logits) or not difference < PARITY_LIMIT:
        raise ParityError(
            f"{variant.file}: the recalibrated graph differs from what it should compute, probabilities by up to "
            f"{difference:.1e} (limit {PARITY_LIMIT:.0e}); nothing was written"
        )
    scale = CalibrationScale(
        form=calibration.form,
        coefficients=calibration.coefficients,
        images=len(labels),
        chose_epoch=manifest.chose_epoch,
    )
    fields = manifest_fields(evaluate(exported, dataset, "test"))
    changed = fields | {"sha256": hashlib.sha256(graph).hexdigest(), "calibration": scale}
    return graph, Variant(**{**variant.model_dump(exclude_unset=True), **changed})


def main() -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog=program_name("cifar_core.recalibrate"),
        description="Fits the calibration of an export anew, on held-out images of the data that it was trained on.",
    )
    add_export_argument(parser)
    add_data_argument(parser)
    arguments = parser.parse_args()
    dataset = load_dataset(arguments.data)
    folder = arguments.export or default_folder(dataset.kind, "exported")
    before = read_manifest(folder)
    for name, variant in recalibrate(folder, dataset).variants.items():
        old = before.variants[name]
        errors = [f"{error:.2%}" if error is not None else "not measured" for error in (old.test_ece, variant.test_ece)]
        form = variant.calibration.form if variant.calibration else ""
        print(
            f"{name}: expected calibration error {errors[0]} before, {errors[1]} now ({form}); "
            f"test accuracy {variant.test_accuracy:.2%}"
        )
    return 0


if __name__ == "__main__":
    run_command(main)
