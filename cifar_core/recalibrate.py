"""Fits the calibration of an export anew, on the held-out images of the data that it was trained on.

    python -m cifar_core.recalibrate [--export exported]

For exports of earlier versions, whose probabilities have a temperature only, and whose run is not at hand. The network
and its logits stay the same, bit for bit; so do the predicted classes and what was measured of them. What was measured
of the previous probabilities is measured again, or removed from the manifest with a warning: losses and calibration
errors with OpenVINO, and the comparison with torch.
"""

import argparse
import hashlib
import logging
from pathlib import Path

import numpy as np

from cifar_core.calibration import caution, choose_calibration
from cifar_core.calibration_graph import add_calibration, without_calibration
from cifar_core.data import Dataset, add_data_argument, load_dataset
from cifar_core.device import CPU
from cifar_core.errors import program_name, run_command
from cifar_core.evaluate import choose_split, evaluate, manifest_fields, manifest_scale
from cifar_core.manifest import FILE_NAME, Manifest, Variant, read_manifest
from cifar_core.parity import PARITY_LIMIT, ParityError
from cifar_core.predictors import onnx_predictor, predict_all
from cifar_core.publish import add_export_argument, read_export, replace
from cifar_core.run_folder import default_folder

logger = logging.getLogger(__name__)

_OF_PROBABILITIES = ("test_loss", "test_ece", "test_ece_equal_mass")
"""What is measured of the probabilities of a variant; all else is measured of its logits."""


def recalibrate(folder: Path, dataset: Dataset) -> Manifest:
    """Replaces the calibration of all variants and measures them on the test images. Returns the manifest.

    Raises:
        ManifestError: There is no export in the folder.
        PublishError: The export is damaged, was trained on other data or replaced meanwhile, or its folder cannot be
            written.
        ParityError: The new graph differs from what it should compute.
    """
    manifest, read = read_export(folder, dataset)
    changed: dict[str, Variant] = {}
    files: dict[str, bytes] = {}
    for name, variant in manifest.variants.items():
        if variant.openvino_precision is None:
            files[variant.file], changed[name] = _recalibrated(read[variant.file], variant, manifest, dataset)
    by_file = {variant.file: variant for variant in changed.values()}
    variants = {
        name: changed[name] if name in changed else _still_true(variant, by_file)
        for name, variant in manifest.variants.items()
    }
    # The parity is that of the fp32 graph. There is no network in torch to measure it again.
    dropped = {"temperature", "variants"}
    if "fp32" in changed and changed["fp32"].sha256 != manifest.variants["fp32"].sha256:
        dropped.add("parity")
    kept = {field: getattr(manifest, field) for field in manifest.model_fields_set - dropped}
    before, manifest = manifest, Manifest(**kept, variants=variants)
    replace(folder, read, files | {FILE_NAME: manifest.to_json()})
    _warn(before, manifest, folder)
    return manifest


def _still_true(variant: Variant, by_file: dict[str, Variant]) -> Variant:
    """A variant that was measured with OpenVINO, without the measurements of the previous probabilities.

    Args:
        variant: its entry before.
        by_file: the new entries of the same graphs, which onnxruntime computes, by file name.
    """
    new = by_file.get(variant.file)
    if new is None or new.sha256 == variant.sha256:
        return variant
    fields = variant.model_dump(exclude_unset=True, exclude=set(_OF_PROBABILITIES))
    return Variant(**{**fields, "sha256": new.sha256, "calibration": new.calibration})


def _warn(before: Manifest, after: Manifest, folder: Path) -> None:
    """Says which measurements the export has lost."""
    lost = [name for name, each in after.variants.items() if each.test_ece is None]
    if any(before.variants[name].test_ece is not None for name in lost):
        logger.warning(
            "losses and calibration errors with OpenVINO held for the previous probabilities and were removed; the "
            "server computes with OpenVINO as before; to measure them again: python -m cifar_core.measure_openvino "
            "--export %s",
            folder,
        )
    if before.parity is not None and after.parity is None:
        logger.warning(
            "the comparison with torch held for the previous probabilities and was removed; to repeat it, export the "
            "run again, if it is at hand: python -m cifar_core.export --run DIR --output %s",
            folder,
        )


def _recalibrated(before: bytes, variant: Variant, manifest: Manifest, dataset: Dataset) -> tuple[bytes, Variant]:
    """The graph of a variant with a new calibration, and its entry; both as before if it has this calibration."""
    predictor = onnx_predictor(before, CPU)
    held_out, _ = choose_split(predictor, dataset, "validation")
    images, labels = held_out.images.numpy(), held_out.labels.numpy()
    logits, previous = predict_all(predictor, images)
    calibration = choose_calibration(logits, labels)
    note = caution(len(labels))
    if note is not None:
        logger.warning("%s: %s", variant.file, note)
    same_form = variant.calibration is not None and variant.calibration.form == calibration.form
    if same_form and np.abs(previous - calibration.probabilities(logits)).max() < PARITY_LIMIT:
        return before, variant  # the export has fitted it to the logits of torch, which round otherwise
    graph = add_calibration(without_calibration(before), calibration)
    exported = onnx_predictor(graph, CPU)
    new_logits, probabilities = predict_all(exported, images)
    difference = float(np.abs(probabilities - calibration.probabilities(logits)).max())
    if not np.array_equal(new_logits, logits) or not difference < PARITY_LIMIT:
        raise ParityError(
            f"{variant.file}: the recalibrated graph differs from what it should compute, probabilities by up to "
            f"{difference:.1e} (limit {PARITY_LIMIT:.0e}); nothing was written"
        )
    scale = manifest_scale(calibration, len(labels), manifest.chose_epoch)
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
    logging.basicConfig(format="%(levelname)s: %(message)s")
    dataset = load_dataset(arguments.data)
    folder = arguments.export or default_folder(dataset.kind, "exported")
    before = read_manifest(folder)
    for name, variant in recalibrate(folder, dataset).variants.items():
        if variant.openvino_precision is not None:
            continue
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
