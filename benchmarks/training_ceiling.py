"""How near a training step comes to what the machine can multiply, and where the rest of its time goes.

    python benchmarks/training_ceiling.py [--recipes sprint;deep-fast;best] [--data ...]

The ceiling: floating-point operations per second of one large matrix product and of large convolutions, forward and
backward, in the precision of the recipe. Beside it a step of each recipe, augmentation and optimizer included, at each
of its image sizes; its operations are counted by torch. Ceiling and steps take turns. Prints a table, and for each
recipe where the time of its full-size step goes.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from cifar_core.data import Dataset, add_data_argument, load_dataset
from cifar_core.device import describe_environment
from cifar_core.recipes import Recipe, get_recipe
from cifar_core.run_folder import RunFolder
from cifar_core.train import Trainer

CPU = torch.device("cpu")
CONVOLUTIONS = ((256, 256, 15), (64, 64, 16), (32, 32, 32))
"""Channels in and out and image size, all 3x3; of the networks' own sizes, the largest of each kind."""


class Work:
    """Something to be timed: what it does and how many operations that is."""

    def __init__(self, name: str, do: Callable[[], object]) -> None:
        self.name, self.do = name, do
        with FlopCounterMode(display=False) as counter:
            do()
        self.operations = counter.get_total_flops()
        self.speeds: list[float] = []

    def measure(self) -> None:
        """Notes operations per second over about two seconds."""
        for _ in range(3):  # what ran before has the caches and the freed memory
            self.do()
        done, began = 0, time.perf_counter()
        while (seconds := time.perf_counter() - began) < 2:
            self.do()
            done += 1
        self.speeds.append(done * self.operations / seconds)

    @property
    def speed(self) -> float:
        """The median, in operations per second."""
        return statistics.median(self.speeds)


def ceilings(dtype: torch.dtype) -> Iterator[Work]:
    """The machine at its best in a precision."""
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
    """A training step of a recipe at each of its image sizes."""
    sizes = {recipe.image_size(epoch): epoch for epoch in range(recipe.epochs)}
    for size, epoch in sizes.items():
        trainer = Trainer(recipe, dataset, RunFolder(place / str(size)), 0, CPU, recipe.precision)
        trainer.model.train()

        def batches(trainer: Trainer = trainer, epoch: int = epoch) -> Iterator[tuple[Tensor, Tensor]]:
            while True:
                trainer.training.step, trainer.training.epoch = 0, epoch
                yield from trainer.batches()

        endless = batches()

        def step(trainer: Trainer = trainer, endless: Iterator[tuple[Tensor, Tensor]] = endless) -> None:
            trainer.train_step(*next(endless))

        step()  # oneDNN makes its kernels
        yield size, Work(f"{recipe.name}, step at {size} pixels", step)


def where_the_time_goes(step: Callable[[], object], lines: int = 12) -> str:
    """Shares of a step's time by operation, as Markdown."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(4):
            step()
    events = sorted(profiled.key_averages(), key=lambda each: -each.self_cpu_time_total)
    total = sum(each.self_cpu_time_total for each in events)
    rows = [f"| {each.key} | {100 * each.self_cpu_time_total / total:.1f} |" for each in events[:lines]]
    return "\n".join(["| operation | % of the step |", "| --- | --- |", *rows])


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_data_argument(parser)
    parser.add_argument("--recipes", default="sprint;deep-fast;best", help="with ; between; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    arguments = parser.parse_args()
    dataset, machine = load_dataset(arguments.data), describe_environment(CPU)
    recipes = [get_recipe(name, overrides) for name, *overrides in map(str.split, arguments.recipes.split(";"))]
    types = sorted({torch.bfloat16 if each.precision == "bf16" else torch.float32 for each in recipes}, key=str)
    tops = {dtype: list(ceilings(dtype)) for dtype in types}
    print(f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}, {arguments.rounds} rounds\n")
    with tempfile.TemporaryDirectory() as folder:
        works = [
            (recipe, size, work)
            for recipe in recipes
            for size, work in steps(recipe, dataset, Path(folder) / recipe.name)
        ]
        for _ in range(arguments.rounds):
            for work in (*(each for group in tops.values() for each in group), *(work for _, _, work in works)):
                work.measure()
        print("| what | GFLOP/s | images/s | % of the best of its precision |\n| --- | --- | --- | --- |")
        best = {dtype: max(each.speed for each in group) for dtype, group in tops.items()}
        for dtype, group in tops.items():
            for each in group:
                print(f"| {each.name} | {each.speed / 1e9:.0f} | | {100 * each.speed / best[dtype]:.0f} |")
        for recipe, _, work in works:
            top = best[torch.bfloat16 if recipe.precision == "bf16" else torch.float32]
            images = work.speed / work.operations * recipe.batch_size
            print(f"| {work.name} | {work.speed / 1e9:.0f} | {images:,.0f} | {100 * work.speed / top:.0f} |")
        for recipe, size, work in works:
            if size == recipe.image_size(recipe.epochs - 1):
                print(f"\n{recipe.name}, {size} pixels\n\n{where_the_time_goes(work.do)}")


if __name__ == "__main__":
    main()
