"""Fixtures for tests of trained models."""

import pytest
import torch

from cifar_core import processor
from cifar_core.data import Dataset
from cifar_core.models import DeepConvNet
from cifar_core.publish import publish
from cifar_core.recipes import RECIPES
from tests.cifar_core.published import export_of


@pytest.fixture
def processor_with(tmp_path_factory, monkeypatch):
    """Lets the system report these instructions of the processor."""
    file = tmp_path_factory.mktemp("processor") / "cpuinfo"

    def set_to(instructions):
        file.write_text(f"flags\t: {instructions}\n")
        monkeypatch.setattr(processor, "_CPU_INFO", file)
        processor.has_matrix_units.cache_clear()

    yield set_to
    processor.has_matrix_units.cache_clear()


@pytest.fixture
def checkpoint(small: Dataset):
    """A checkpoint of the deep network with random weights."""
    torch.manual_seed(0)
    return {
        "model": DeepConvNet().state_dict(),
        "recipe": RECIPES["deep"].values(),
        "seed": 0,
        "epoch": 25,
        "classes": list(small.classes),
        "data": {"kind": "synthetic", "name": small.name, "fingerprint": small.fingerprint},
        "validation_accuracy": 0.1,
    }


@pytest.fixture
def existing(tmp_path):
    """An export, with a file of the user next to it."""
    target = tmp_path / "exported"
    publish(target, export_of(fp32=b"1" * 1000, int8=b"2" * 1000))
    (target / "notes.txt").write_text("mine")
    return target
