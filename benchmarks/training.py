"""Training throughput with the recipes of the study, beside a plain PyTorch loop.

    python benchmarks/training.py [--data ...] [--rounds 15] [--steps 30]

The plain loop uses a data set that turns one image at a time into a normalised tensor (ToTensor, Normalize), a
DataLoader, fp32, and PyTorch's default memory layout; like our loop it adds up loss and accuracy. It is measured with
images in memory, as `torchvision.datasets.CIFAR10` holds them, and, if the data is a folder, also with
`torchvision.datasets.ImageFolder`, which opens one file per image.

Each loop runs in its own process. The loops take turns, a few steps each, so that changes in the speed of the machine
affect all of them. The table shows the median speed of each loop, and the median of the ratios within a round.
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from torchvision import datasets, transforms
from tqdm import tqdm

from cifar_core.data import Dataset, add_data_argument, load_dataset
from cifar_core.device import CPU, describe_environment
from cifar_core.layers import CIFAR10_MEAN, CIFAR10_STD
from cifar_core.recipe import Precision
from cifar_core.recipes import get_recipe
from cifar_core.run_folder import RunFolder
from cifar_core.trainer import Trainer

Steps = Callable[[int], None]

FOLDER_LOOP = "plain, image folder"
LOOPS = ("plain, in memory", FOLDER_LOOP, "ours, fp32", "ours, bf16")


def data_folder(data: str | None) -> Path:
    """The folder given by --data or CIFAR10_DATA."""
    return Path(data or os.environ["CIFAR10_DATA"])


class InMemory(TorchDataset[tuple[Tensor, int]]):
    """Returns one image at a time from an array, like torchvision.datasets.CIFAR10."""

    def __init__(self, dataset: Dataset, transform: Callable[[Image.Image], Tensor]) -> None:
        self.images, self.labels = dataset.train.images.numpy(), dataset.train.labels.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def plain_network(recipe_name: str, classes: int) -> nn.Module:
    """The network as the text of the study describes it."""
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
    """A function that trains for a given number of steps."""
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
    """A function that trains for a given number of steps with the Trainer of the library."""
    trainer = Trainer(get_recipe(recipe_name), dataset, RunFolder(place), 0, CPU, precision)
    trainer.model.train()

    def endless() -> Iterator[tuple[Tensor, ...]]:
        while True:
            trainer.state.step = 0
            yield from trainer.batches()

    batches = endless()

    def train(steps: int) -> None:
        for _ in range(steps):
            trainer.train_step(*next(batches))

    return train


def build_loop(name: str, recipe_name: str, data: str | None, place: Path) -> Steps:
    """The loop with this name from `LOOPS`."""
    dataset = load_dataset(data)
    if name.startswith("ours"):
        return our_loop(recipe_name, dataset, "bf16" if name.endswith("bf16") else "fp32", place)
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize(CIFAR10_MEAN, CIFAR10_STD)])
    images: TorchDataset[tuple[Tensor, int]] = InMemory(dataset, transform)
    if name == FOLDER_LOOP:
        images = datasets.ImageFolder(data_folder(data) / "train", transform)
    return plain_loop(recipe_name, images, len(dataset.classes))


def serve_loop(connection: Connection, name: str, recipe_name: str, data: str | None) -> None:
    """The main function of a loop's process.

    It receives a number of steps, trains for that many steps, and sends back the seconds it took. It ends at 0.
    """
    with tempfile.TemporaryDirectory() as place:
        train = build_loop(name, recipe_name, data, Path(place))
        train(8)  # warm-up: the first steps allocate memory and compile oneDNN's kernels
        while steps := connection.recv():
            train(3)  # the other loops have replaced the content of the caches meanwhile
            started = time.perf_counter()
            train(steps)
            connection.send(time.perf_counter() - started)


def measure(names: list[str], recipe_name: str, data: str | None, rounds: int, steps: int) -> dict[str, list[float]]:
    """Images per second of each loop in each round."""
    context = multiprocessing.get_context("spawn")
    connections = {}
    for name in names:
        connections[name], child = context.Pipe()
        context.Process(target=serve_loop, args=(child, name, recipe_name, data), daemon=True).start()
    images = steps * get_recipe(recipe_name).batch_size
    speeds: dict[str, list[float]] = {name: [] for name in names}
    for round_number in tqdm(range(rounds + 1), unit="round", disable=None):
        for name, connection in connections.items():
            connection.send(steps)
            seconds = connection.recv()
            if round_number:  # in the first round other processes are still starting
                speeds[name].append(images / seconds)
    for connection in connections.values():
        connection.send(0)
    return speeds


def print_table(recipe_name: str, speeds: dict[str, list[float]]) -> None:
    """Prints one line per loop: images per second, and the ratio to each plain loop."""
    peers = [name for name in speeds if name.startswith("plain")]
    print(f"\n{recipe_name:20s}  images/s  (lowest to highest)" + "".join(f"   × {peer}" for peer in peers))
    for name, values in speeds.items():
        columns = ""
        for peer in peers:
            ratio = statistics.median(own / other for own, other in zip(values, speeds[peer], strict=True))
            columns += f"{ratio:{len(peer) + 5}.2f}"
        spread = f"({min(values):6,.0f} to {max(values):6,.0f})"
        print(f"{name:20s}  {statistics.median(values):8,.0f}  {spread}{columns}")


def main() -> None:
    """Measures all loops and prints the tables."""
    parser = argparse.ArgumentParser(description="Measures training throughput beside a plain PyTorch loop.")
    add_data_argument(parser)
    parser.add_argument("--rounds", type=int, default=15, help="number of rounds; default: %(default)s")
    parser.add_argument(
        "--steps", type=int, default=30, help="training steps of each loop in a round; default: %(default)s"
    )
    arguments = parser.parse_args()
    dataset = load_dataset(arguments.data)
    names = [name for name in LOOPS if name != FOLDER_LOOP or dataset.kind == "folder"]
    machine = describe_environment(CPU)
    print(f"{dataset.name}; {machine['device']}, {machine['threads']} threads, torch {machine['torch']}; batch size 32")
    for recipe_name in ("baseline", "deep"):
        print_table(recipe_name, measure(names, recipe_name, arguments.data, arguments.rounds, arguments.steps))


if __name__ == "__main__":
    main()
