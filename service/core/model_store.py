"""An export's folder -> a verified, warmed model; a new export takes its place while the server runs.

Must never know requests. Reads the manifest and the file that it names for the variant, and nothing else.
"""

import asyncio
import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cifar_core.images import IMAGE_SIZE
from service.core.engine import Device, Engine
from service.errors import StartError

logger = logging.getLogger(__name__)

MODEL_NAME = "cifar10"
MANIFEST = "manifest.json"
SCHEMA_VERSION = 1
POLL_SECONDS = 1.0


@dataclass(frozen=True, eq=False)
class Model:
    """What is served: a graph with what its manifest says of it."""

    version: str
    variant: str
    classes: tuple[str, ...]
    test_accuracy: float
    trained_on: str
    sha256: str
    engine: Engine

    @property
    def name(self) -> str:
        """Under which clients of the Open Inference Protocol ask for it."""
        return MODEL_NAME


def load(folder: Path, variant: str, *, device: Device, threads: int, max_batch_size: int) -> Model:
    """Reads, verifies, self-tests and warms the variant of an export.

    Raises:
        StartError: Something is missing, damaged or not as the manifest says; the message names it.
    """
    manifest = _read_manifest(folder / MANIFEST)
    variants = manifest["variants"]
    if variant not in variants:
        raise StartError(f"{folder / MANIFEST} has no variant '{variant}'; it has {', '.join(sorted(variants))}")
    entry = variants[variant]
    path = folder / _plain_name(entry["file"], folder)
    try:
        graph = path.read_bytes()
    except OSError as error:
        raise StartError(f"{path}, which the manifest names, cannot be read: {error.strerror}") from error
    # What is hashed is what is loaded: the file is read once.
    digest = hashlib.sha256(graph).hexdigest()
    if digest != entry["sha256"]:
        raise StartError(
            f"{path} is not the file that was exported: its SHA-256 is {digest}, the manifest's {entry['sha256']}"
        )
    try:
        engine = Engine(graph, device, threads)
        classes = tuple(manifest["classes"])
        _self_test(engine, classes, str(manifest["model_version"]))
        engine.warm_up(max_batch_size)
    except StartError as error:
        raise StartError(f"{path}: {error}") from error
    return Model(
        version=str(manifest["model_version"]),
        variant=variant,
        classes=classes,
        test_accuracy=float(entry["test_accuracy"]),
        trained_on=_fingerprint(manifest),
        sha256=digest,
        engine=engine,
    )


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise StartError(f"there is no model: {path} does not exist (make export writes it)") from error
    except OSError as error:
        raise StartError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise StartError(f"{path} is not JSON: {error}") from error
    if not isinstance(manifest, dict):
        raise StartError(f"{path} is not a manifest: it holds no JSON object")
    if manifest.get("schema_version") != SCHEMA_VERSION:
        raise StartError(
            f"{path} has schema_version {manifest.get('schema_version')!r}; this server reads {SCHEMA_VERSION}"
        )
    problem = _problem_of(manifest)
    if problem:
        raise StartError(f"{path}: {problem}")
    return manifest


def _problem_of(manifest: dict[str, Any]) -> str | None:
    classes, variants = manifest.get("classes"), manifest.get("variants")
    if not isinstance(manifest.get("model_version"), str):
        return "model_version is not a string"
    if not isinstance(classes, list) or not classes or not all(isinstance(name, str) for name in classes):
        return "classes is not a list of names"
    if not isinstance(variants, dict) or not variants:
        return "variants is not an object with one variant at least"
    for name, entry in variants.items():
        if not isinstance(entry, dict):
            return f"variant '{name}' is not an object"
        for key, kinds in (("file", str), ("sha256", str), ("test_accuracy", (int, float))):
            if not isinstance(entry.get(key), kinds):
                return f"variant '{name}' has no valid '{key}'"
    return None


def _fingerprint(manifest: dict[str, Any]) -> str:
    data = manifest.get("data")
    return str(data.get("fingerprint", "")) if isinstance(data, dict) else ""


def _plain_name(name: str, folder: Path) -> str:
    if name in ("", ".", "..") or Path(name).name != name:
        raise StartError(f"{folder / MANIFEST} names the file '{name}'; it must lie in the manifest's own folder")
    return name


def _self_test(engine: Engine, classes: tuple[str, ...], version: str) -> None:
    """That the graph computes what the manifest promises, on pictures made here."""
    if engine.classes != len(classes):
        raise StartError(f"the graph has {engine.classes} classes, the manifest names {len(classes)}")
    inside = engine.metadata.get("model_version", version)
    if inside != version:
        raise StartError(f"the graph says that it is model version '{inside}', the manifest '{version}'")
    images = np.random.default_rng(0).integers(0, 256, (3, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    try:
        logits, probabilities = engine.compute(images)
        alone = np.concatenate([engine.compute(images[row : row + 1])[1] for row in range(len(images))])
    except Exception as error:  # onnxruntime's errors have no common class but this
        raise StartError(f"self-test: the graph fails: {' '.join(str(error).split())}") from error
    if logits.shape != (len(images), len(classes)) or probabilities.shape != logits.shape:
        raise StartError(
            f"self-test: outputs of shape {logits.shape} and {probabilities.shape} for {len(images)} images"
        )
    if not (np.isfinite(logits).all() and np.isfinite(probabilities).all()):
        raise StartError("self-test: the outputs are not finite")
    if probabilities.min() < 0 or not np.allclose(probabilities.sum(axis=1), 1, atol=1e-4):
        raise StartError("self-test: the probabilities of an image do not sum to 1")
    if not np.allclose(probabilities, alone, atol=1e-3):
        raise StartError("self-test: an image's probabilities depend on the others in its batch")


class ModelStore:
    """The model that is served now. Only `reload` changes it, and only to one that was verified.

    Args:
        folder: Of the export.
        loader: Makes a model from the folder; runs in a thread.
        on_reload: Told of the outcome of each reload: the new model, or None where it was refused.
    """

    def __init__(
        self, folder: Path, loader: Callable[[Path], Model], on_reload: Callable[[Model | None], None]
    ) -> None:
        self._folder, self._loader, self._on_reload = folder, loader, on_reload
        self._seen = self._signature()
        self._reloading = asyncio.Lock()
        self.current = loader(folder)

    async def reload(self) -> bool:
        """Takes what lies in the folder now; where it is refused the old model goes on. True: the new one is served."""
        async with self._reloading:
            self._seen = self._signature()
            try:
                model = await asyncio.get_running_loop().run_in_executor(None, self._loader, self._folder)
            except StartError as error:
                logger.error("the new export is refused, %s goes on: %s", self.current.version, error)  # noqa: TRY400
                self._on_reload(None)
                return False
            except Exception:
                logger.exception("the new export could not be loaded, %s goes on", self.current.version)
                self._on_reload(None)
                return False
            old, self.current = self.current, model
            logger.info("model %s (%s) takes the place of %s", model.version, model.variant, old.version)
            self._on_reload(model)
            return True

    async def watch(self) -> None:
        """Reloads whenever the manifest, or a file that it names, changes; until cancelled."""
        while True:
            await asyncio.sleep(POLL_SECONDS)
            if self._signature() != self._seen:
                await self.reload()

    def _signature(self) -> tuple[tuple[str, int, int, int], ...]:
        # Of the whole folder, so that a model file that follows its manifest late is noticed too.
        try:
            entries = [(path.name, path.stat()) for path in self._folder.iterdir()]
        except OSError:
            return ()
        return tuple(sorted((name, status.st_ino, status.st_size, status.st_mtime_ns) for name, status in entries))
