"""Starting a training run from trained weights: of a run, a checkpoint or an exported graph.

An exported graph contains its weights, so nothing else has to be kept next to it. Its batch normalisation has been
fused into the convolutions; `start_from` undoes that. Nothing is unpickled: checkpoints are read as plain tensors.
"""

import copy
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from cifar_core.data import Dataset
from cifar_core.errors import CifarError
from cifar_core.files import read_regular
from cifar_core.held_out import TrainedOn, reason_against
from cifar_core.models import NORMALISED_LAYERS, Network, fuse_batch_norm
from cifar_core.predictors import BATCH, build_model, model_file
from cifar_core.recipe import Recipe, read_recipe
from cifar_core.run_folder import load_checkpoint, weights_digest

_PREFIX = "network."
"""Begins the names of the network's tensors in an exported graph."""
_HEAD = "head."


class InitialWeightsError(CifarError):
    """Weights that cannot be read, or that do not fit the network of the recipe."""


@dataclass(frozen=True)
class InitialWeights:
    """Trained weights to start from.

    Attributes:
        name: where they come from, for messages; never a path.
        classes: class names of the outputs.
        digest: SHA-256 of the weights, in hexadecimal.
        states: the tensors by name, in one or two forms: as they were trained, and with fused batch normalisation.
        trained_on: the images that they were trained on; None if the graph does not say so.
    """

    name: str
    classes: tuple[str, ...]
    digest: str
    states: tuple[dict[str, Tensor], ...]
    trained_on: TrainedOn | None

    def description(self) -> dict[str, str]:
        """The entry in recipe.json."""
        return {"name": self.name, "weights": self.digest}

    def is_for(self, classes: tuple[str, ...]) -> bool:
        """Whether the output layer can be used too: the classes are the same, in the same order."""
        return self.classes == classes


def read_initial_weights(source: Path) -> InitialWeights:
    """Reads trained weights.

    Args:
        source: the folder of an export (its fp32 variant), a run folder (its best.pt), an .onnx file or a .pt file.

    Raises:
        InitialWeightsError: The file is missing, no graph of this project, quantised, or damaged.
        ManifestError, RunError, PredictorError: The folder or checkpoint is damaged or not of this project.
    """
    file = model_file(source)
    if file.suffix == ".onnx":
        return _from_graph(file)
    if not source.exists():
        raise InitialWeightsError(
            f"--init {source}: this file or folder does not exist; name an export, a run folder, an .onnx or a .pt file"
        )
    checkpoint = load_checkpoint(file)
    model = build_model(checkpoint)
    recipe = read_recipe(checkpoint["recipe"])
    fused = fuse_batch_norm(model)
    states = [dict(model.state_dict())] + ([dict(fused.state_dict())] if fused is not model else [])
    _check_finite(source, states[0])
    return InitialWeights(
        f"{recipe.name}, seed {checkpoint['seed']}",
        tuple(checkpoint["classes"]),
        weights_digest(checkpoint["model"]),
        tuple(states),
        TrainedOn(checkpoint["data"]["fingerprint"], recipe.validation_images, recipe.split_seed),
    )


def _from_graph(path: Path) -> InitialWeights:
    """The weights of an exported graph."""
    try:
        content = read_regular(path)
        model = onnx.load_from_string(content)
    except FileNotFoundError:
        raise InitialWeightsError(f"--init {path}: this file does not exist") from None
    except OSError as error:
        raise InitialWeightsError(f"--init {path}: this file cannot be read ({error.strerror})") from error
    except Exception as error:  # protobuf and onnx raise several kinds for damaged files
        raise InitialWeightsError(f"--init {path}: this file cannot be read as an ONNX graph ({error})") from error
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    outputs = [value.name for value in model.graph.output]
    if not {"classes", "model_version"} <= metadata.keys() or "logits" not in outputs:
        raise InitialWeightsError(f"--init {path}: not a graph of this project; write one with: make export")
    if any(node.op_type == "DequantizeLinear" for node in model.graph.node):
        raise InitialWeightsError(f"--init {path}: this graph is quantised; use model.onnx of the same export")
    state = _graph_state(model)
    _check_finite(path, state)
    return InitialWeights(
        metadata["model_version"],
        tuple(json.loads(metadata["classes"])),
        hashlib.sha256(content).hexdigest(),
        (state,),
        _trained_on(metadata),
    )


def _trained_on(metadata: Mapping[str, str]) -> TrainedOn | None:
    try:
        return TrainedOn(metadata["trained_on"], int(metadata["validation_images"]), int(metadata["split_seed"]))
    except (KeyError, ValueError):
        return None


def check_initial_weights(initial: InitialWeights, recipe: Recipe, dataset: Dataset) -> None:
    """Checks that a run can start from these weights.

    Raises:
        InitialWeightsError: They were trained on images that the run holds out.
    """
    if not initial.is_for(dataset.classes):  # other classes, and so other images
        return
    if reason := reason_against(initial.name, initial.trained_on, recipe, dataset):
        raise InitialWeightsError(f"--init: {reason}")


def _check_finite(source: Path, state: Mapping[str, Tensor]) -> None:
    for name, tensor in state.items():
        if not bool(tensor.isfinite().all()):
            raise InitialWeightsError(
                f"--init {source}: {name} contains a value that is not finite, so the file is damaged or its training "
                "failed; use other weights"
            )


def _graph_state(model: onnx.ModelProto) -> dict[str, Tensor]:
    """The network's tensors in a graph, by their names in the fused network."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    arrays = {name: onnx.numpy_helper.to_array(tensor) for name, tensor in tensors.items()}
    state = {
        name.removeprefix(_PREFIX): torch.from_numpy(np.array(array))
        for name, array in arrays.items()
        if name.startswith(_PREFIX)
    }
    (last,) = (node for node in model.graph.node if "logits" in node.output)
    if last.op_type == "MatMul":  # an output layer without a bias: the exporter stores its weights transposed
        state = {name: tensor for name, tensor in state.items() if not name.startswith(_HEAD)}
        state[f"{_HEAD}weight"] = torch.from_numpy(arrays[last.input[1]].T.copy())
    if all(name.partition(".")[0].isdecimal() for name in state):  # exported before layers had names
        state = dict(sorted(state.items(), key=lambda item: int(item[0].partition(".")[0])))
    return state


def start_from(initial: InitialWeights, model: Network, classes: tuple[str, ...], images: Tensor) -> None:
    """Sets the weights of a network with fresh weights. With other classes, its output layer stays fresh.

    Args:
        initial: the weights.
        model: the network; on any device.
        classes: class names of the network's outputs.
        images: uint8 [N, 32, 32, 3], training images on the device of the network. If the weights contain fused batch
            normalisation, its statistics are computed anew from them.

    Raises:
        InitialWeightsError: The weights are those of another network.
    """
    fused = fuse_batch_norm(copy.deepcopy(model).eval())
    reasons = []
    for state in initial.states:
        for target, load in ((model, model.load_state_dict), (fused, _loader_of_fused(model, images))):
            prepared, reason = _prepare(state, target.state_dict(), keep_head=initial.is_for(classes))
            if prepared is not None:
                load(prepared)
                model.train()
                return
            reasons.append(reason)
    raise InitialWeightsError(
        f"the weights of {initial.name} are not those of the network of this recipe ({reasons[0]}); train a recipe "
        "with the same network"
    )


def _prepare(
    state: Mapping[str, Tensor], target: Mapping[str, Tensor], keep_head: bool
) -> tuple[dict[str, Tensor] | None, str]:
    """The tensors to load into a network with the state dict `target`; or None and the first difference."""
    if all(name.partition(".")[0].isdecimal() for name in state) and len(state) == len(target):
        state = dict(zip(target, state.values(), strict=True))
    if state.keys() != target.keys():
        different = sorted(state.keys() ^ target.keys())
        return None, f"only one of them has the tensor {different[0]}"
    prepared = {}
    for name, tensor in target.items():
        if name.startswith(_HEAD) and not keep_head:
            prepared[name] = tensor
        elif state[name].shape != tensor.shape:
            return None, f"{name} has the shape {list(state[name].shape)} and not {list(tensor.shape)}"
        else:
            prepared[name] = state[name]
    return prepared, ""


def _loader_of_fused(model: Network, images: Tensor) -> Callable[[Mapping[str, Tensor]], None]:
    """Loads weights without batch normalisation into a network that may have it."""

    def load(state: Mapping[str, Tensor]) -> None:
        biases = {name: tensor for name, tensor in state.items() if name not in model.state_dict()}
        model.load_state_dict({name: state.get(name, tensor) for name, tensor in model.state_dict().items()})
        _insert_batch_norm(model, biases, images)

    return load


@torch.no_grad()
def _insert_batch_norm(model: Network, biases: Mapping[str, Tensor], images: Tensor) -> None:
    """Sets every batch normalisation so that the network computes what the fused network computes.

    The scale and shift of a normalisation are chosen to undo it: with the mean m and deviation s of a channel, the
    scale is s and the shift is m plus the bias of the fused layer. From there on training normalises as usual.

    Args:
        model: the network, with the weights of the fused one.
        biases: the biases of the fused layers, by name.
        images: uint8 [N, 32, 32, 3], from which the statistics are computed.
    """
    model.eval()
    # In the order of the computation: the hidden layer belongs to the network itself and comes after all blocks.
    modules = list(model.named_modules())
    for path, module in (*modules[1:], modules[0]):
        for layer_name, norm_name in NORMALISED_LAYERS:
            norm = getattr(module, norm_name, None)
            if not isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
                continue
            mean, variance = _input_statistics(model, norm, images)
            norm.running_mean.copy_(mean)  # type: ignore[union-attr]
            norm.running_var.copy_(variance)  # type: ignore[union-attr]
            norm.weight.copy_((variance + norm.eps).sqrt())
            bias = biases[f"{path}.{layer_name}.bias".removeprefix(".")]
            norm.bias.copy_(mean + bias.to(mean.device))


def _input_statistics(model: Network, layer: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel of a layer's input, float32 [C] each."""
    sums: list[Tensor] = []

    def record(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        values = inputs[0].transpose(0, 1).flatten(1).double()
        sums.append(
            torch.stack([values.sum(1), values.square().sum(1), torch.full_like(values[:, 0], values.shape[1])])
        )

    with layer.register_forward_pre_hook(record):
        for batch in torch.split(images, BATCH):
            model(batch)
    total, squares, count = torch.stack(sums).sum(0)
    mean = total / count
    return mean.float(), (squares / count - mean.square()).clamp(min=0).float()
