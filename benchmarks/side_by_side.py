"""What it gains to lay small images side by side while convolutions are trained (cifar_core/convolution.py).

    python benchmarks/side_by_side.py [--recipes fast;best] [--rounds 7] [--data ...]

With and without it, in turns: first the forward and backward passes of single convolutions, then training steps on
2,000 images. The last table also gives the time of whole trainings as a multiple of airbench94's eight epochs without
it: an estimate, from the median of the steps, without start and validation. Needs a CPU with matrix units (AMX), and
nothing else should run on the machine.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from cifar_core import convolution
from cifar_core.convolution import Conv3x3
from cifar_core.data import Dataset, add_data_argument, load_dataset
from cifar_core.device import CPU, default_precision, describe_environment, keep_freed_memory
from cifar_core.processor import has_matrix_units
from cifar_core.recipes import get_recipe
from cifar_core.run_folder import RunFolder
from cifar_core.study.markdown import markdown_table
from cifar_core.trainer import Trainer

LAYERS = ((256, 256, 7), (64, 256, 15), (256, 256, 3), (64, 64, 15), (128, 128, 8), (256, 256, 4))
"""Channels of input and output, and height and width in pixels."""
IMAGES = 980
IMAGES_OF_STEPS = 2000
SCRIPT_IMAGES = 50_000
"""Images of an epoch of airbench's script; our recipes train on the images of the data that are not held out."""

Seconds = dict[bool, list[float]]


def in_turns(work: dict[str, Callable[[], int]], rounds: int) -> dict[str, Seconds]:
    """Seconds that each work takes per image, with images side by side (True) and without (False)."""
    result: dict[str, Seconds] = {name: {False: [], True: []} for name in work}
    for number in range(rounds + 1):
        for name, do in work.items():
            for side_by_side in (False, True):
                plain = patch.object(convolution, "has_matrix_units", lambda: False)
                with nullcontext() if side_by_side else plain:
                    began = time.perf_counter()
                    images = do()
                if number:  # the first round is a warm-up
                    result[name][side_by_side].append((time.perf_counter() - began) / images)
    return result


def layer_work(channels_in: int, channels: int, size: int) -> Callable[[], int]:
    """The forward and backward passes of a convolution, with the gradients of input and weights."""
    layer = Conv3x3(channels_in, channels).to(memory_format=torch.channels_last)
    images, upstream = (
        torch.randn(IMAGES, number, size, size, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
        for number in (channels_in, channels)
    )
    images.requires_grad_()

    def work() -> int:
        with torch.autocast("cpu", torch.bfloat16):
            output = layer(images)
        torch.autograd.grad(output, (images, layer.weight), upstream)
        return IMAGES

    return work


def step_work(trainer: Trainer) -> Callable[[], int]:
    """Training steps on `IMAGES_OF_STEPS` images, without the first epochs of small images and whitening bias."""
    trainer.model.train()

    def endless() -> Iterator[tuple[Tensor, ...]]:
        while True:
            trainer.state.epoch, trainer.state.step = trainer.recipe.epochs - 1, 0
            trainer._start_epoch()
            yield from trainer.batches()

    batches = endless()

    def work() -> int:
        images = 0
        while images < IMAGES_OF_STEPS:
            batch = next(batches)
            trainer.train_step(*batch)
            images += len(batch[1])
        return images

    return work


def ratio(seconds: Seconds) -> str:
    """Median and range of the ratios within the rounds."""
    ratios = sorted(after / before for before, after in zip(seconds[False], seconds[True], strict=True))
    return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"


def step_rows(names: list[str], dataset: Dataset, rounds: int, place: Path) -> list[list[str]]:
    """The rows of the table of training steps."""
    recipes = {name: get_recipe(name) for name in names}
    trainers = {
        name: Trainer(recipe, dataset, RunFolder(place / name), 0, CPU, default_precision(recipe, CPU))
        for name, recipe in recipes.items()
    }
    measured = in_turns({name: step_work(trainer) for name, trainer in trainers.items()}, rounds)
    script = 8 * SCRIPT_IMAGES * statistics.median(measured["airbench94"][False])
    rows = []
    for name, trainer in trainers.items():
        before, after = (statistics.median(measured[name][side_by_side]) for side_by_side in (False, True))
        whole = trainer.recipe.epochs * len(trainer.train_indices) * after / script
        rows.append([name, f"{1e6 * before:.0f}", f"{1e6 * after:.0f}", ratio(measured[name]), f"{whole:.2f}"])
    return rows


def main() -> None:
    """Measures layers and steps, and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_data_argument(parser)
    parser.add_argument(
        "--recipes",
        default="fast;medium;long;best;deep-fast",
        help="recipes, separated by semicolons, apart from airbench94; default: %(default)s",
    )
    parser.add_argument("--rounds", type=int, default=7, help="number of rounds; default: %(default)s")
    arguments = parser.parse_args()
    if not has_matrix_units():
        raise SystemExit("this processor has no matrix units for bf16 (amx_bf16), so images are not laid side by side")
    keep_freed_memory()
    dataset, machine = load_dataset(arguments.data), describe_environment(CPU)
    print(f"{dataset.name}; {machine['device']}, {machine['threads']} threads, torch {machine['torch']}\n")
    names = {f"{before} to {after}, {size}x{size}": (before, after, size) for before, after, size in LAYERS}
    measured = in_turns({name: layer_work(*values) for name, values in names.items()}, arguments.rounds)
    rows = [
        [name, *(f"{1000 * IMAGES * statistics.median(seconds[way]):.0f}" for way in (False, True)), ratio(seconds)]
        for name, seconds in measured.items()
    ]
    print(markdown_table(("channels, pixels", "torch, ms", "side by side, ms", "ratio"), rows), end="\n\n", flush=True)
    with tempfile.TemporaryDirectory() as place:
        rows = step_rows(["airbench94", *arguments.recipes.split(";")], dataset, arguments.rounds, Path(place))
    header = ("recipe", "torch, µs an image", "side by side", "ratio", "whole training, multiple of airbench94's")
    print(markdown_table(header, rows))


if __name__ == "__main__":
    main()
