"""Trainers and comparisons of runs that several test modules use."""

import torch

from cifar_core.device import CPU
from cifar_core.recipes import get_recipe
from cifar_core.run_folder import RunFolder, load_checkpoint
from cifar_core.train import run
from cifar_core.trainer import Trainer


def make_trainer(dataset, path, name="dropout-0.2", overrides=("epochs=2",), seed=0, precision="fp32"):
    """A trainer on the CPU that writes to this folder."""
    return Trainer(get_recipe(name, list(overrides)), dataset, RunFolder(path), seed, CPU, precision)


def assert_same_run(one, other):
    """Checks that all tensors of both checkpoints are equal bit by bit, and the histories up to durations."""
    for name in ("best", "last"):
        left, right = load_checkpoint(getattr(one, name)), load_checkpoint(getattr(other, name))
        assert left["epoch"] == right["epoch"]
        for key, tensor in left["model"].items():
            assert torch.equal(tensor, right["model"][key]), f"{name}.pt: {key} differs"
        if name == "last":
            assert torch.equal(left["rng"], right["rng"])
            for key, state in left["optimizer"]["state"].items():
                assert torch.equal(state["momentum_buffer"], right["optimizer"]["state"][key]["momentum_buffer"])
    histories = [[{**line, "seconds": 0} for line in folder.history()] for folder in (one, other)]
    assert histories[0] == histories[1]


def trained(dataset, path, *overrides, validation_accuracy):
    """A run trained for some epochs, whose history then claims this validation accuracy."""
    recipe = get_recipe("sprint", ["batch_size=27", "sizes=", "width=4", *overrides])
    folder = RunFolder(path / recipe.name / "0")
    run(Trainer(recipe, dataset, folder, 0, CPU, "fp32"), resume=False)
    folder.write_history([line | {"validation_accuracy": validation_accuracy} for line in folder.history()])
    return folder
