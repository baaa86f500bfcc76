"""Training throughput at the study's own setting, beside the plain PyTorch loop that anybody would write first.

    python benchmarks/training.py [--data ...] [--rounds 15] [--steps 30]

The plain loop: a data set that turns one image at a time into a normalised tensor (ToTensor, Normalize), a DataLoader,
fp32, PyTorch's default layout; it sums up loss and accuracy as ours does. It is measured on images that lie in memory
as PIL sees them, as `torchvision.datasets.CIFAR10` keeps them, and, where the data is a folder, also on
`torchvision.datasets.ImageFolder`, which opens a file for each image.

All loops take turns, a few steps each, so that the machine's moods meet all of them; what is printed is each loop's
median over the rounds, and the median of the ratios within a round.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from torchvision import datasets, transforms
from tqdm import tqdm

from cifar_core.data import Dataset, add_data_argument, load_dataset
from cifar_core.device import describe_environment
from cifar_core.models import CIFAR10_MEAN, CIFAR10_STD
from cifar_core.recipes import get_recipe
from cifar_core.run_folder import RunFolder
from cifar_core.train import Precision, Trainer

CPU = torch.device("cpu")
Steps = Callable[[int], None]


class InMemory(TorchDataset[tuple[Tensor, int]]):
    """One image at a time out of an array, as torchvision.datasets.CIFAR10 does it."""

    def __init__(self, dataset: Dataset, transform: Callable[[Image.Image], Tensor]) -> None:
        self.images, self.labels = dataset.train.images.numpy(), dataset.train.labels.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def plain_network(recipe_name: str, classes: int) -> nn.Module:
    """The network as the study's text spells it out."""
    deep = recipe_name == "deep"
    layers: list[nn.Module] = []
    channels, padding = 3, 1 if deep else 0
    for width in (32, 64, 128, 256) if deep else (32, 64):
        layers += [nn.Conv2d(channels, width, 3, padding=padding), nn.ReLU()]
        layers += [nn.Conv2d(width, width, 3, padding=padding), nn.ReLU(), nn.MaxPool2d(2)]
        layers += [nn.Dropout(0.2)] if deep else []
        channels = width
    return nn.Sequential(
        *layers, nn.Flatten(), nn.Linear(1024 if deep else 1600, 512), nn.ReLU(), nn.Linear(512, classes)
    )


def plain_loop(recipe_name: str, images: TorchDataset[tuple[Tensor, int]], classes: int) -> Steps:
    """A function that trains a number of steps."""
    recipe = get_recipe(recipe_name)
    model = plain_network(recipe_name, classes)
    optimizer = torch.optim.SGD(model.parameters(), lr=recipe.learning_rate, momentum=recipe.momentum)
    loader = DataLoader(images, batch_size=recipe.batch_size, shuffle=True)
    criterion = nn.CrossEntropyLoss()

    def endless() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield from loader

    batches = endless()

    def train(steps: int) -> None:
        running_loss, correct = 0.0, 0
        for _ in range(steps):
            inputs, labels = next(batches)
            optimizer.zero_grad()
            outputs = model(inputs)
            loss = criterion(outputs, labels)
            loss.backward()
            optimizer.step()
            running_loss += loss.item()
            correct += int((outputs.argmax(1) == labels).sum().item())

    return train


def our_loop(recipe_name: str, dataset: Dataset, precision: Precision, place: Path) -> Steps:
    """A function that trains a number of steps with the library's own Trainer."""
    trainer = Trainer(get_recipe(recipe_name), dataset, RunFolder(place), 0, CPU, precision)
    trainer.model.train()

    def endless() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            trainer.training.step = 0
            yield from trainer.batches()

    batches = endless()

    def train(steps: int) -> None:
        for _ in range(steps):
            trainer.train_step(*next(batches))

    return train


def build_loops(recipe_name: str, dataset: Dataset, folder: Path | None, place: Path) -> dict[str, Steps]:
    """Every loop to be measured, by name; the plain ones first."""
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize(CIFAR10_MEAN, CIFAR10_STD)])
    classes = len(dataset.classes)
    loops = {"plain, in memory": plain_loop(recipe_name, InMemory(dataset, transform), classes)}
    if folder is not None:
        loops["plain, image folder"] = plain_loop(
            recipe_name, datasets.ImageFolder(folder / "train", transform), classes
        )
    return loops | {
        "ours, fp32": our_loop(recipe_name, dataset, "fp32", place),
        "ours, bf16": our_loop(recipe_name, dataset, "bf16", place),
    }


def measure(loops: dict[str, Steps], rounds: int, steps: int, batch_size: int) -> dict[str, list[float]]:
    """Images per second of every loop in every round."""
    for train in loops.values():
        train(5)  # the first steps pay for memory and for oneDNN's kernels
    speeds: dict[str, list[float]] = {name: [] for name in loops}
    for _ in tqdm(range(rounds), unit="round", disable=None):
        for name, train in loops.items():
            started = time.perf_counter()
            train(steps)
            speeds[name].append(steps * batch_size / (time.perf_counter() - started))
    return speeds


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description="Training throughput beside a plain PyTorch loop.")
    add_data_argument(parser)
    parser.add_argument("--rounds", type=int, default=15, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=30, help="of each loop in a round; default: %(default)s")
    arguments = parser.parse_args()
    dataset = load_dataset(arguments.data)
    folder = Path(arguments.data or os.environ.get("CIFAR10_DATA", "")) if dataset.kind == "folder" else None
    machine = describe_environment(CPU)
    print(f"{dataset.name}; {machine['device']}, {machine['threads']} threads, torch {machine['torch']}; batch size 32")
    for recipe_name in ("baseline", "deep"):
        with tempfile.TemporaryDirectory() as place:
            loops = build_loops(recipe_name, dataset, folder, Path(place))
            speeds = measure(loops, arguments.rounds, arguments.steps, get_recipe(recipe_name).batch_size)
        peers = [name for name in loops if name.startswith("plain")]
        print(f"\n{recipe_name:20s}  images/s  (lowest to highest)" + "".join(f"   × {peer}" for peer in peers))
        for name, values in speeds.items():
            ratios = [
                statistics.median(ours / theirs for ours, theirs in zip(values, speeds[peer], strict=True))
                for peer in peers
            ]
            columns = "".join(f"{ratio:{len(peer) + 5}.2f}" for ratio, peer in zip(ratios, peers, strict=True))
            print(
                f"{name:20s}  {statistics.median(values):8,.0f}  ({min(values):6,.0f} to {max(values):6,.0f}){columns}"
            )


if __name__ == "__main__":
    main()
