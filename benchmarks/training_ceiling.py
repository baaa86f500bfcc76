"""The speed of a training step compared with the arithmetic limit of the machine, and a profile of the step.

    python benchmarks/training_ceiling.py [--recipes sprint;deep-fast;best] [--data ...]

The limit is the number of floating-point operations per second of a large matrix product and of large convolutions,
forward and backward, in the precision of the recipe. It is compared with a step of each recipe, including augmentation
and optimizer, at each of its image sizes; torch counts the operations. All measurements take turns. Prints a table, and
for each recipe the share of each operation in the time of a step at full size.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from cifar_core import convolution
from cifar_core.data import Dataset, add_data_argument, load_dataset
from cifar_core.device import CPU, default_precision, describe_environment
from cifar_core.recipe import Recipe
from cifar_core.recipes import get_recipe
from cifar_core.run_folder import RunFolder
from cifar_core.study.markdown import markdown_table
from cifar_core.trainer import Trainer

CONVOLUTIONS = ((256, 256, 15), (64, 64, 16), (32, 32, 32))
"""Input channels, output channels and image size of 3x3 convolutions, of sizes that occur in the networks."""


class Work:
    """A computation to be timed, with its number of floating-point operations."""

    def __init__(self, name: str, do: Callable[[], object]) -> None:
        self.name, self.do = name, do
        # Columns of zeros between images that are side by side are no work.
        with (
            patch.object(convolution, "has_matrix_units", lambda: False),
            FlopCounterMode(display=False) as counter,
        ):
            do()
        self.operations = counter.get_total_flops()
        self.speeds: list[float] = []

    def measure(self) -> None:
        """Measures operations per second for about two seconds."""
        for _ in range(3):  # warm-up: the computation before has filled the caches
            self.do()
        done, began = 0, time.perf_counter()
        while (seconds := time.perf_counter() - began) < 2:
            self.do()
            done += 1
        self.speeds.append(done * self.operations / seconds)

    @property
    def speed(self) -> float:
        """The median speed, in operations per second."""
        return statistics.median(self.speeds)


def ceilings(dtype: torch.dtype) -> Iterator[Work]:
    """The computations that define the limit of the machine in a precision."""
    left, right = (torch.randn(2048, 2048, dtype=dtype) for _ in range(2))
    yield Work(f"matrix product 2048³, {dtype}", lambda: left @ right)
    for channels_in, channels, size in CONVOLUTIONS:
        layer = nn.Conv2d(channels_in, channels, 3, padding=1, bias=False).to(dtype)
        layer.to(memory_format=torch.channels_last)
        images = torch.randn(256, channels_in, size, size, dtype=dtype).to(memory_format=torch.channels_last)
        images.requires_grad_()
        upstream = torch.randn_like(layer(images))

        def step(layer: nn.Conv2d = layer, images: Tensor = images, upstream: Tensor = upstream) -> None:
            images.grad = layer.weight.grad = None
            layer(images).backward(upstream)

        yield Work(f"convolution {channels_in}→{channels} at {size}², forward and backward, {dtype}", step)


def steps(recipe: Recipe, dataset: Dataset, place: Path) -> Iterator[tuple[int, Work]]:
    """A training step of a recipe at each of its image sizes, with that size in pixels."""
    sizes = {recipe.image_size(epoch): epoch for epoch in range(recipe.epochs)}
    for size, epoch in sizes.items():
        trainer = Trainer(recipe, dataset, RunFolder(place / str(size)), 0, CPU, default_precision(recipe, CPU))
        trainer.model.train()

        def batches(trainer: Trainer = trainer, epoch: int = epoch) -> Iterator[tuple[Tensor, ...]]:
            while True:
                trainer.state.step, trainer.state.epoch = 0, epoch
                yield from trainer.batches()

        endless = batches()

        def step(trainer: Trainer = trainer, endless: Iterator[tuple[Tensor, ...]] = endless) -> None:
            trainer.train_step(*next(endless))

        step()  # oneDNN compiles its kernels in the first step
        yield size, Work(f"{recipe.name}, step at {size} pixels", step)


def profile_step(step: Callable[[], object], lines: int = 12) -> str:
    """The share of each operation in the time of a step, as Markdown."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(4):
            step()
    events = sorted(profiled.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    rows = [(event.key, f"{100 * event.self_cpu_time_total / total:.1f}") for event in events[:lines]]
    return markdown_table(("operation", "% of the step"), rows)


def _dtype(recipe: Recipe) -> torch.dtype:
    return torch.bfloat16 if default_precision(recipe, CPU) == "bf16" else torch.float32


def speed_table(limits: dict[torch.dtype, list[Work]], recipe_steps: list[tuple[Recipe, int, Work]]) -> str:
    """The measured speeds, and their share of the highest speed in the same precision, as Markdown."""
    highest = {dtype: max(work.speed for work in works) for dtype, works in limits.items()}
    rows = [
        (work.name, f"{work.speed / 1e9:.0f}", "", f"{100 * work.speed / highest[dtype]:.0f}")
        for dtype, works in limits.items()
        for work in works
    ]
    for recipe, _, work in recipe_steps:
        images = work.speed / work.operations * recipe.batch_size
        share = 100 * work.speed / highest[_dtype(recipe)]
        rows.append((work.name, f"{work.speed / 1e9:.0f}", f"{images:,.0f}", f"{share:.0f}"))
    return markdown_table(("computation", "GFLOP/s", "images/s", "% of the highest in its precision"), rows)


def main() -> None:
    """Measures everything and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_data_argument(parser)
    parser.add_argument(
        "--recipes",
        default="sprint;deep-fast;best",
        help="recipes, each as NAME or NAME KEY=VALUE ..., separated by semicolons; default: %(default)s",
    )
    parser.add_argument("--rounds", type=int, default=5, help="number of rounds; default: %(default)s")
    arguments = parser.parse_args()
    dataset, machine = load_dataset(arguments.data), describe_environment(CPU)
    recipes = [get_recipe(name, overrides) for name, *overrides in map(str.split, arguments.recipes.split(";"))]
    limits = {dtype: list(ceilings(dtype)) for dtype in sorted({_dtype(recipe) for recipe in recipes}, key=str)}
    print(f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}, {arguments.rounds} rounds\n")
    with tempfile.TemporaryDirectory() as folder:
        recipe_steps = [
            (recipe, size, work)
            for recipe in recipes
            for size, work in steps(recipe, dataset, Path(folder) / recipe.name)
        ]
        for _ in range(arguments.rounds):
            for work in (*(work for works in limits.values() for work in works), *(work for *_, work in recipe_steps)):
                work.measure()
        print(speed_table(limits, recipe_steps))
        for recipe, size, work in recipe_steps:
            if size == recipe.image_size(recipe.epochs - 1):
                print(f"\n{recipe.name}, {size} pixels\n\n{profile_step(work.do)}")


if __name__ == "__main__":
    main()
