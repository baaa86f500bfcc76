"""Loads the model from the folder of an export, verifies it, and replaces it while the server runs.

Knows nothing of requests. Reads the manifest and the one file that the manifest names for the variant in use.
"""

import asyncio
import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cifar_core import openvino
from cifar_core.files import read_regular
from cifar_core.int8 import EARLIER_WEIGHT_BITS
from cifar_core.manifest import FILE_NAME, Manifest, ManifestError, read_manifest
from cifar_core.pixels import IMAGE_SIZE
from service.core.engine import Device, Engine
from service.core.export_numbers import ExportNumbers
from service.errors import StartError
from service.watch import NotReady, Watcher

logger = logging.getLogger(__name__)

DEFAULT_NAME = "cifar10"

# Largest difference of a probability that rounding may cause, between batches and between libraries.
_TOLERANCE = 1e-3
# OpenVINO rounds int8 otherwise than onnxruntime, and bf16 has 8 significant bits.
_OPENVINO_TOLERANCE = {"int8": 0.03, "bf16": 0.1}


@dataclass(frozen=True, eq=False)
class Model:
    """A verified model, with the information of its manifest.

    Attributes:
        version: The export's own name: recipe, seed and the beginning of a digest of the weights.
        variant: Name of the variant, such as fp32 or int8.
        classes: Class names in the order of the outputs.
        test_accuracy: Share of the test images classified correctly, 0 to 1.
        trained_on: Fingerprint of the training data, in hexadecimal; empty if unknown.
        sha256: Digest of the ONNX file, in hexadecimal.
        engine: Computes the graph.
        name: The name by which clients of the Open Inference Protocol address the model.
        number: Its version for these clients; see service.core.export_numbers.
    """

    version: str
    variant: str
    classes: tuple[str, ...]
    test_accuracy: float
    trained_on: str
    sha256: str
    engine: Engine
    name: str = DEFAULT_NAME
    number: int = 1

    @property
    def device(self) -> str:
        """The device that computes the graph: "cpu", "cuda" or "openvino"."""
        return self.engine.device


def load(folder: Path, variant: str, *, device: Device, threads: int, max_batch_size: int) -> Model:
    """Reads, verifies, self-tests and warms up one variant of an export.

    Args:
        folder: Folder with manifest.json and the files that it names.
        variant: Name of the variant in the manifest.
        device: Device to compute on; see `Engine`.
        threads: Number of intra-op threads; see `Engine`.
        max_batch_size: Size of the largest batch to warm up with.

    Raises:
        NotReady: A file is missing or unreadable, or the ONNX file is not the one that the manifest describes: the
            export may still be being copied.
        StartError: The export is invalid or does not run here. The message names the file.
    """
    manifest = _read_manifest(folder)
    try:
        entry = manifest.variant(variant, openvino=device == "openvino")
    except ManifestError as error:
        raise StartError(f"{folder / FILE_NAME}: {error}") from error
    path = folder / entry.file
    weight_bits = entry.weight_bits or EARLIER_WEIGHT_BITS
    if device == "openvino" and (variant == "int8" or entry.weight_bits is not None):
        try:
            openvino.check_weight_bits(weight_bits)
        except openvino.OpenVinoError as error:
            raise StartError(f"{path}: --device openvino: {error}") from error
    try:
        graph = read_regular(path)
    except OSError as error:
        raise NotReady(f"{path}, named by the manifest, cannot be read: {error.strerror}") from error
    # The bytes that are hashed are the bytes that are loaded: the file is read only once.
    if hashlib.sha256(graph).hexdigest() != entry.sha256:
        # Without the digest of the file: while a file is being copied, it differs at each attempt.
        raise NotReady(
            f"{path} is not the file that was exported: its SHA-256 differs from the manifest's, {entry.sha256}; "
            "copy the whole export again"
        )
    try:
        engine = Engine(graph, device, threads, entry.openvino_precision or "fp32", weight_bits)
        tolerance = _TOLERANCE
        if device == "openvino":
            tolerance = _OPENVINO_TOLERANCE.get(variant, _TOLERANCE)
            _compare(engine, Engine(graph, "cpu"), tolerance)
        _self_test(engine, manifest.classes, manifest.model_version, tolerance)
        _warm_up(engine, max_batch_size)
    except StartError as error:
        raise StartError(f"{path}: {error}") from error
    return Model(
        version=manifest.model_version,
        variant=variant,
        classes=manifest.classes,
        test_accuracy=entry.test_accuracy,
        trained_on=manifest.data.fingerprint,
        sha256=entry.sha256,
        engine=engine,
    )


def _read_manifest(folder: Path) -> Manifest:
    try:
        return read_manifest(folder)
    except ManifestError as error:
        raise NotReady(str(error)) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _warm_up(engine: Engine, max_batch_size: int) -> None:
    try:
        engine.warm_up(max_batch_size)
    except Exception as error:  # onnxruntime's errors share no other base class
        raise StartError(f"warm-up with batches of up to {max_batch_size} images fails: {_one_line(error)}") from error


def _self_test(engine: Engine, classes: tuple[str, ...], version: str, tolerance: float) -> None:
    """Checks on random images that the graph computes what the manifest and the contract of the export promise."""
    if engine.classes != len(classes):
        raise StartError(f"the graph has {engine.classes} classes, the manifest names {len(classes)}")
    inside = engine.metadata.get("model_version", version)
    if inside != version:
        raise StartError(f"the graph is of model version '{inside}', the manifest of '{version}'")
    images = _random_images()
    try:
        logits, probabilities = engine.compute(images, alone=True)
        # Batches that run beside others are computed by another session.
        single = np.concatenate([engine.compute(images[row : row + 1], alone=False)[1] for row in range(len(images))])
    except Exception as error:  # onnxruntime's errors share no other base class
        raise StartError(f"self-test: the graph fails: {_one_line(error)}") from error
    if logits.shape != (len(images), len(classes)) or probabilities.shape != logits.shape:
        raise StartError(
            f"self-test: outputs of shape {logits.shape} and {probabilities.shape} for {len(images)} images"
        )
    if not (np.isfinite(logits).all() and np.isfinite(probabilities).all()):
        raise StartError("self-test: the outputs are not finite")
    if probabilities.min() < 0 or not np.allclose(probabilities.sum(axis=1), 1, atol=1e-4):
        raise StartError("self-test: the probabilities of an image do not sum to 1")
    if not np.allclose(probabilities, single, atol=tolerance):
        raise StartError("self-test: an image's probabilities depend on the others in its batch")


def _compare(engine: Engine, reference: Engine, tolerance: float) -> None:
    """Checks on random images that OpenVINO computes on this processor what onnxruntime computes."""
    images = _random_images()
    try:
        expected = reference.compute(images, alone=True)[1]
        differences = [np.abs(engine.compute(images, alone=alone)[1] - expected).max() for alone in (True, False)]
    except Exception as error:  # onnxruntime's errors share no other base class
        raise StartError(f"self-test: the graph fails: {_one_line(error)}") from error
    if not max(differences) <= tolerance:
        raise StartError(
            f"self-test: probabilities computed by OpenVINO differ by {max(differences):.2g} from onnxruntime's; at "
            f"most {tolerance:g} is allowed: use --device cpu"
        )


def _random_images() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (3, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)


class ModelStore:
    """Holds the model in use. Replaces it only by one that was verified.

    Args:
        folder: Folder of the export.
        variant: Name of the variant in the manifest.
        device: Device to compute on; see `Engine`. Reloads stay on the device that "auto" chose at the start.
        threads: Number of intra-op threads; see `Engine`.
        max_batch_size: Size of the largest batch to warm up with.
        on_reload: Called after each reload with the new model, or with None if the new export was refused. Can be set
            later, before `reload` and `watch` are called.
        name: The name by which clients of the Open Inference Protocol address the model.
        numbers: Numbers the exports; None: this store alone counts them.

    Raises:
        StartError: The export cannot be used; see `load`.
    """

    def __init__(
        self,
        folder: Path,
        variant: str,
        *,
        device: Device,
        threads: int,
        max_batch_size: int,
        on_reload: Callable[[Model | None], None] = lambda _: None,
        name: str = DEFAULT_NAME,
        numbers: ExportNumbers | None = None,
    ) -> None:
        self._folder, self._variant, self._name = folder, variant, name
        self._numbers = numbers or ExportNumbers()
        self._threads, self._max_batch_size = threads, max_batch_size
        self.on_reload = on_reload
        self._openvino = device == "openvino"
        self._watcher = Watcher(self._files, self._replace, self._keep_old)
        self.current = self._load(device)

    async def reload(self) -> bool:
        """Loads the export in the folder, changed or not. Returns False if it was refused and the old model stays."""
        return await self._watcher.force()

    async def watch(self) -> None:
        """Reloads when the manifest changes, or the file that it names for this variant; until cancelled."""
        await self._watcher.run()

    def _files(self) -> list[Path]:
        manifest = self._folder / FILE_NAME
        try:
            variant = read_manifest(self._folder).variant(self._variant, openvino=self._openvino)
            return [manifest, self._folder / variant.file]
        except ManifestError:  # reported by the reload that follows
            return [manifest]

    def _load(self, device: Device) -> Model:
        model = load(
            self._folder, self._variant, device=device, threads=self._threads, max_batch_size=self._max_batch_size
        )
        identity = json.dumps((model.version, model.variant, model.sha256, model.classes))
        return replace(model, name=self._name, number=self._numbers.number_of(identity))

    async def _replace(self) -> None:
        # The device of the model in use, not the option: "auto" would silently fall back to the CPU when the GPU has
        # no memory for two models.
        model = await asyncio.to_thread(self._load, self.current.engine.device)
        old, self.current = self.current, model
        logger.info("model %s (%s), version %d, replaces %s", model.version, model.variant, model.number, old.version)
        self.on_reload(model)

    def _keep_old(self, error: Exception) -> None:
        trace = None if isinstance(error, StartError) else error
        logger.error(
            "the new export is refused, %s stays in use: %s",
            self.current.version,
            str(error) or repr(error),
            exc_info=trace,
        )
        self.on_reload(None)
