"""One interface for every form of a model (run, checkpoint, ONNX file, running server): images in, logits out."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cifar_core.errors import CifarError
from cifar_core.int8 import EXACT_INT8
from cifar_core.manifest import FILE_NAME, read_variant
from cifar_core.models import Network
from cifar_core.openvino import Precision, open_session
from cifar_core.pixels import IMAGE_SIZE
from cifar_core.recipe import RecipeError, read_recipe
from cifar_core.run_folder import RunFolder, load_checkpoint

BATCH = 256
"""Images per batch in `predict_all`."""
SERVER_SCHEME = "grpc://"
"""Begins the address of a running server, as in grpc://127.0.0.1:50051."""
_CONNECT_ATTEMPTS = 3

UInt8 = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


class PredictorError(CifarError):
    """A model that cannot be read or computed, or a server that does not answer."""


@dataclass(frozen=True)
class Predictor:
    """A model in any form.

    Attributes:
        name: name for reports: recipe, seed and epoch, or the model version.
        classes: class names, in the order of the outputs.
        predict: computes one batch: uint8 [N, 32, 32, 3] -> logits and probabilities, float32 [N, classes] each.
        split: number of validation images and seed of the split that the model was trained with, as `data.split` takes
            them; None if the model does not say.
        trained_on: fingerprint of the data that the model was trained on.
        has_logits: whether the logits are the network's own; a server returns only probabilities.
        calibrated: whether the probabilities are not simply the softmax of the logits; they are for a checkpoint.
    """

    name: str
    classes: tuple[str, ...]
    predict: Callable[[UInt8], tuple[Floats, Floats]]
    split: tuple[int, int] | None
    trained_on: str
    has_logits: bool = True
    calibrated: bool = True


def load_predictor(address: str | Path, device: torch.device) -> Predictor:
    """Reads an export (its fp32 variant), a run folder (its best weights), an .onnx or a .pt file, or asks a server.

    Args:
        address: a path, or grpc://HOST:PORT.
        device: the device to compute on; a server ignores it.

    Raises:
        PredictorError: The path, ONNX file or server is missing, damaged or not of this project.
        ManifestError: The export is damaged.
        RunError: The run folder or checkpoint is missing, damaged or not of this project.
    """
    if str(address).startswith(SERVER_SCHEME):
        return server_predictor(str(address).removeprefix(SERVER_SCHEME))
    file = model_file(Path(address))
    if file.suffix == ".onnx":
        return onnx_predictor(file, device)
    checkpoint = load_checkpoint(file)
    try:
        return torch_predictor(checkpoint, device)
    except PredictorError as error:
        raise PredictorError(f"{file}: {error}") from error


def model_file(source: Path) -> Path:
    """The file of a model: model.onnx of an export, best.pt of a run folder, or the path itself if it is no folder.

    Raises:
        PredictorError: The folder is neither.
        ManifestError: The export is damaged.
    """
    if not source.is_dir():
        return source
    if (source / FILE_NAME).exists():
        return read_variant(source)[0]
    run = RunFolder(source)
    if run.best.exists() or run.is_started():
        return run.best
    raise PredictorError(
        f"{source}: this folder holds no model, neither {FILE_NAME} of an export nor {run.best.name} of a run; name "
        "an export, a run folder, an .onnx or a .pt file"
    )


def predict_all(predictor: Predictor, images: UInt8, batch_size: int = BATCH) -> tuple[Floats, Floats]:
    """Logits and probabilities, float32 [N, classes] each, of uint8 [N, 32, 32, 3], computed in batches."""
    parts = [predictor.predict(images[first : first + batch_size]) for first in range(0, len(images), batch_size)]
    logits, probabilities = zip(*parts, strict=True)
    return np.concatenate(logits), np.concatenate(probabilities)


def build_model(checkpoint: dict[str, Any]) -> Network:
    """The network of a checkpoint with its weights, in evaluation mode on the CPU.

    Raises:
        PredictorError: The weights are not those of the network that the recipe names.
    """
    try:
        recipe = read_recipe(checkpoint["recipe"])
        model = recipe.make_model(len(checkpoint["classes"]))
        model.load_weights(checkpoint["model"])
    except (RecipeError, KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise PredictorError(f"the weights of this checkpoint do not fit its recipe ({error}); train again") from error
    return model.eval()


def torch_predictor(checkpoint: dict[str, Any], device: torch.device) -> Predictor:
    """A checkpoint, computed by torch; in fp32, unless the caller has turned autocast on.

    Raises:
        PredictorError: The weights are not those of the network that the recipe names.
    """
    model = build_model(checkpoint)
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    @torch.inference_mode()
    def predict(images: UInt8) -> tuple[Floats, Floats]:
        logits = model(torch.from_numpy(images).to(device)).float()  # bfloat16 under autocast
        return logits.cpu().numpy(), torch.softmax(logits, 1).cpu().numpy()

    recipe = read_recipe(checkpoint["recipe"])
    return Predictor(
        name=f"{recipe.name}, seed {checkpoint['seed']}, epoch {checkpoint['epoch']}",
        classes=tuple(checkpoint["classes"]),
        predict=predict,
        split=(recipe.validation_images, recipe.split_seed),
        trained_on=checkpoint["data"]["fingerprint"],
        calibrated=False,
    )


def onnx_predictor(model: Path | bytes, device: torch.device) -> Predictor:
    """An exported graph, computed by onnxruntime.

    Raises:
        PredictorError: The file is missing, not an ONNX file, or not a graph of this project; or CUDA was requested and
            onnxruntime cannot use it.
    """
    name = str(model) if isinstance(model, Path) else "the exported graph"
    return _session_predictor(_onnx_session(model, name, device), name)


def openvino_predictor(graph: bytes, threads: int, precision: Precision) -> Predictor:
    """An exported graph, computed by OpenVINO as the server computes it.

    Args:
        graph: content of the ONNX file.
        threads: number of threads.
        precision: of the operations that are not in int8.

    Raises:
        PredictorError: It is not a graph of this project.
        OpenVinoError: OpenVINO is not installed, or cannot compute it here.
    """
    return _session_predictor(open_session(graph, threads, 1, precision), "the exported graph")


def _session_predictor(session: Any, name: str) -> Predictor:  # noqa: ANN401 (onnxruntime has no types)
    metadata = session.get_modelmeta().custom_metadata_map
    inputs = [(value.name, value.type, value.shape[1:]) for value in session.get_inputs()]
    outputs = [value.name for value in session.get_outputs()]
    if (
        inputs != [("images", "tensor(uint8)", [IMAGE_SIZE, IMAGE_SIZE, 3])]
        or outputs != ["logits", "probabilities"]
        or not {"classes", "model_version", "trained_on", "validation_images", "split_seed"} <= metadata.keys()
    ):
        raise PredictorError(
            f"{name}: not a graph of this project (inputs: {inputs}; outputs: {outputs}; metadata: "
            f"{', '.join(sorted(metadata)) or 'none'}); write one with: make export"
        )

    def predict(images: UInt8) -> tuple[Floats, Floats]:
        logits, probabilities = session.run(outputs, {"images": images})
        return logits, probabilities

    return Predictor(
        name=metadata["model_version"],
        classes=tuple(json.loads(metadata["classes"])),
        predict=predict,
        split=(int(metadata["validation_images"]), int(metadata["split_seed"])),
        trained_on=metadata["trained_on"],
    )


def _onnx_session(model: Path | bytes, name: str, device: torch.device) -> Any:  # noqa: ANN401 (onnxruntime has no types)
    import onnxruntime

    if isinstance(model, Path) and not model.is_file():
        raise PredictorError(f"{name}: this file does not exist; write it with: make train export")
    provider = "CUDAExecutionProvider" if device.type == "cuda" else "CPUExecutionProvider"
    if provider not in onnxruntime.get_available_providers():
        raise PredictorError(
            f"onnxruntime {onnxruntime.__version__} has no {provider}; install the extra cuda, or use --device cpu"
        )
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry(EXACT_INT8, "1")  # the graph does not say of how many bits its weights are
    try:
        content = model if isinstance(model, bytes) else name
        session = onnxruntime.InferenceSession(content, options, providers=[provider])
    except Exception as error:
        raise PredictorError(
            f"{name}: this file cannot be read as an ONNX graph ({str(error).splitlines()[0]}); export the model again"
        ) from error
    if provider not in session.get_providers():
        # onnxruntime falls back to the CPU without an error.
        raise PredictorError(
            f"onnxruntime could not start its {provider}; check the CUDA libraries, or use --device cpu"
        )
    return session


def server_predictor(target: str) -> Predictor:
    """A running server, queried over gRPC. It returns probabilities; their logarithms serve as logits.

    Args:
        target: HOST:PORT.

    Raises:
        PredictorError: The address is not one, or the server does not answer.
    """
    from service.client import ClassificationError, Client, Options

    address = f"{SERVER_SCHEME}{target}"
    try:
        asking = Client(target, Options(attempts=_CONNECT_ATTEMPTS))  # a server that does not run should fail soon
    except ValueError as error:
        raise PredictorError(f"{address} is not the address of a server: {error}") from error
    try:
        with asking:
            model = asking.model()
    except ClassificationError as error:
        raise PredictorError(f"{address} does not answer ({error}); start a server with: make serve") from error

    client = Client(target)

    def predict(images: UInt8) -> tuple[Floats, Floats]:
        try:
            probabilities = client.probabilities(images)
        except ClassificationError as error:
            raise PredictorError(f"{address} stopped answering ({error}); check the server") from error
        with np.errstate(divide="ignore"):
            return np.log(probabilities), probabilities

    return Predictor(
        name=f"{model.version} at {address} ({model.variant} on {model.device})",
        classes=tuple(model.classes),
        predict=predict,
        split=None,
        trained_on=model.trained_on,
        has_logits=False,
    )
