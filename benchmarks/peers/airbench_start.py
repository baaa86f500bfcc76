"""Runs a training script of airbench once on this project's data, with or without a GPU; prints what it does.

    python benchmarks/peers/airbench_start.py SCRIPT [--data ...] [--seed 0]

Prints one line of JSON when training begins (with the whitening filters), when an evaluation begins, when it ends, with
its accuracy, and at the end. Whoever reads the lines can thus measure the time that the script itself measures.

The script is not changed. It uses a GPU and half precision. Without a GPU, the functions that it calls are replaced:
tensors stay on the CPU, half precision becomes bfloat16 (fp32 on CPUs that do not compute in bfloat16), and the network
is not compiled. The images are written beforehand to the files that the script would otherwise make from a download, so
its time includes no download.
"""

import argparse
import importlib.util
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from cifar_core.data import Dataset, Images, add_data_argument, load_dataset
from cifar_core.device import keep_freed_memory
from cifar_core.processor import has_bf16

Unchanged = TypeVar("Unchanged")


class Moment:
    """A point in time with the interface of a CUDA event."""

    def __init__(self, **_: object) -> None:
        self._time = 0.0

    def record(self) -> None:
        """Records the current time."""
        self._time = time.perf_counter()

    def elapsed_time(self, later: "Moment") -> float:
        """Milliseconds between this point in time and a later one."""
        return 1000 * (later._time - self._time)


def stand_in_for_cuda() -> None:
    """Replaces functions of torch so that code for a GPU runs on the CPU, in bfloat16 where it computes in that."""

    def stay(self: Unchanged, *_: object, **__: object) -> Unchanged:
        return self

    load = torch.load
    names: dict[str, Any] = {
        "load": lambda path, **_: load(path, map_location="cpu", weights_only=True),
        "compile": lambda function=None, **_: function or (lambda each: each),
    }
    for name, value in names.items():
        setattr(torch, name, value)
    torch.cuda.Event = Moment  # type: ignore[assignment, misc]
    torch.cuda.synchronize = lambda *_: None
    for kind in (torch.Tensor, nn.Module):
        kind.cuda = stay  # type: ignore[method-assign, assignment]
        if not has_bf16():  # the script's optimizer calls it
            kind.bfloat16 = kind.float  # type: ignore[method-assign]
        kind.half = kind.bfloat16  # type: ignore[method-assign]


def lay_out(dataset: Dataset, seed: int) -> None:
    """Writes the images to the files that the script reads.

    The script computes its whitening filters from the first 5,000 training images. In a folder these are nearly all of
    one class, and in the official archive they are in random order, so the training images are shuffled.
    """
    Path("cifar10").mkdir()
    order = np.random.RandomState(seed).permutation(len(dataset.train))
    train = Images(dataset.train.images[order], dataset.train.labels[order])
    for name, part in (("train", train), ("test", dataset.test)):
        content = {"images": part.images, "labels": part.labels, "classes": list(dataset.classes)}
        torch.save(content, f"cifar10/{name}.pt")


def load_script(path: Path) -> ModuleType:
    """Imports the script as a module without running its main block."""
    sys.argv = [str(path)]  # the script reads its own source
    specification = importlib.util.spec_from_file_location("airbench", path)
    if specification is None or specification.loader is None:
        raise SystemExit(f"{path}: not a Python file")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def mark(what: str, **values: object) -> None:
    """Prints a line for the program that measures the time."""
    print(json.dumps({"mark": what, **values}), flush=True)


def main() -> None:
    """Trains the network of the script once."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("script", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    add_data_argument(parser)
    arguments = parser.parse_args()
    dataset, script_file = load_dataset(arguments.data), arguments.script.resolve()
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        keep_freed_memory()  # as in our own training
        stand_in_for_cuda()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        lay_out(dataset, arguments.seed)
        script = load_script(script_file)
        torch.manual_seed(arguments.seed)
        evaluate = script.evaluate

        def evaluate_with_marks(model: nn.Module, loader: object, tta_level: int = 0) -> float:
            mark("evaluating")
            accuracy = float(evaluate(model, loader, tta_level))
            mark("evaluated", accuracy=accuracy, level=tta_level)
            return accuracy

        script.evaluate = evaluate_with_marks
        init_whiten = script.CifarNet.init_whiten

        def init_whiten_with_mark(model: nn.Module, images: torch.Tensor) -> None:
            mark("training")
            init_whiten(model, images)

        script.CifarNet.init_whiten = init_whiten_with_mark
        model = script.CifarNet().cuda().to(memory_format=torch.channels_last)
        if on_gpu:
            model.compile(mode="max-autotune")
            script.main("warmup", model)
        script.main(0, model)
        os.chdir("/")
    mark("finished", parameters=sum(each.numel() for each in model.parameters()))


if __name__ == "__main__":
    main()
