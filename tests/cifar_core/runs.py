"""Finished runs with random weights and made-up accuracies, and weights in the form of earlier versions."""

from pathlib import Path

import torch
from torch import Tensor

from cifar_core.data import Dataset
from cifar_core.recipes import RECIPES
from cifar_core.run_folder import RunFolder


def make_run(dataset: Dataset, path: Path, name: str, validation_accuracy: float, seed: int = 0) -> RunFolder:
    """A finished run with random weights, scaled so that its logits differ as much as those of a trained network."""
    recipe = RECIPES[name].model_copy(update={"epochs": 1})
    torch.manual_seed(seed)
    model = recipe.make_model(len(dataset.classes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 1.7
    folder = RunFolder(path / name / str(seed))
    folder.path.mkdir(parents=True)
    about = {
        "recipe": recipe.values(),
        "seed": seed,
        "precision": "fp32",
        "classes": list(dataset.classes),
        "data": {"kind": dataset.kind, "name": dataset.name, "fingerprint": dataset.fingerprint},
    }
    folder.write_description(about | {"environment": {}})
    measured = dict.fromkeys(("train_loss", "train_accuracy", "validation_loss", "learning_rate", "seconds"), 0.5)
    line = measured | {"epoch": 1, "validation_accuracy": validation_accuracy}
    weights = about | {"model": model.state_dict(), "epoch": 1, "validation_accuracy": validation_accuracy}
    folder.save(weights | {"history": [line]}, weights)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """The content of every file in a folder, by name."""
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def number_layers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict as it was before layers had names: layers were numbered, as in `1.weight`."""
    numbers: dict[str, int] = {}
    renamed = {}
    for name, tensor in state.items():
        layer, _, tensor_name = name.rpartition(".")
        renamed[f"{numbers.setdefault(layer, len(numbers))}.{tensor_name}"] = tensor
    return renamed
