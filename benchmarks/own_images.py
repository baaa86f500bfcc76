"""Training on one's own images from trained weights and from scratch, on a folder made from the data set.

    python benchmarks/own_images.py prepare FOLDER [--data ...]     writes the folder of images
    python benchmarks/own_images.py compare FOLDER [--seeds 5]      trains and prints a table

`prepare` writes five classes of 200 images as PNG files of 48 to 300 pixels, in <class>/*. It takes test images of the
data set, which the shipped model was not trained on. FOLDER must not be committed: it shows images of the data set.
`compare` skips runs that are finished, so it can be stopped and started again.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from cifar_core.data import add_data_argument, load_dataset
from cifar_core.study.markdown import markdown_table

REPOSITORY = Path(__file__).parents[1]
CLASSES = 5
IMAGES = 200
"""Number of images of each class."""
SIDES = (48, 300)
"""Smallest and largest height and width of a file, in pixels."""
VARIANTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("small, from scratch", ("small",)),
    ("fine-tune, from scratch", ("fine-tune",)),
    ("fine-tune, --init exported", ("fine-tune", "--init", str(REPOSITORY / "exported"))),
)


def prepare(folder: Path, data: str | None) -> None:
    """Writes the images."""
    dataset = load_dataset(data)
    random = np.random.RandomState(0)
    for label in range(0, len(dataset.classes), 2):
        rows = np.flatnonzero(dataset.test.labels.numpy() == label)[:IMAGES]
        place = folder / dataset.classes[label]
        place.mkdir(parents=True, exist_ok=True)
        for row in rows:
            width, height = random.randint(SIDES[0], SIDES[1] + 1, 2)
            side = int(min(width, height))
            # The decoder crops to the central square; the rest of the file is a grey border.
            picture = Image.fromarray(dataset.test.images[row].numpy())
            canvas = Image.new("RGB", (int(width), int(height)), (128, 128, 128))
            square = picture.resize((side, side), Image.Resampling.BICUBIC)
            canvas.paste(square, ((int(width) - side) // 2, (int(height) - side) // 2))
            canvas.save(place / f"{row:05d}.png")


def accuracy(folder: Path, runs: Path, arguments: Sequence[str], seed: int) -> float:
    """Trains one run if it is not finished, evaluates it once, and returns its test accuracy."""
    result = runs / f"{arguments[0]}{'-init' if len(arguments) > 1 else ''}-{seed}.json"
    if not result.exists():
        common = ["--data", str(folder)]
        place = runs / result.stem
        command = [sys.executable, "-m", "cifar_core.train", *arguments, "--seed", str(seed), "--runs", str(place)]
        subprocess.run([*command, "--resume", *common], cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL)
        (run,) = place.glob("*/*")
        evaluation = [sys.executable, "-m", "cifar_core.evaluate", "--model", str(run), "--json", str(result)]
        subprocess.run([*evaluation, *common], cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL)
    return float(json.loads(result.read_bytes())["accuracy"])


def main() -> None:
    """Runs one of the two commands."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("command", choices=("prepare", "compare"))
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds; default: %(default)s")
    parser.add_argument(
        "--runs",
        type=Path,
        default=Path("runs/own-images"),
        metavar="DIR",
        help="folder for runs; default: %(default)s",
    )
    add_data_argument(parser)
    arguments = parser.parse_args()
    folder, runs = arguments.folder.resolve(), arguments.runs.resolve()
    if arguments.command == "prepare":
        prepare(folder, arguments.data)
        return
    rows = []
    for name, options in VARIANTS:
        values = [100 * accuracy(folder, runs, options, seed) for seed in range(arguments.seeds)]
        spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        rows.append([name, f"{statistics.fmean(values):.1f}{spread}", ", ".join(f"{value:.1f}" for value in values)])
    print(markdown_table(("recipe", "test accuracy, %", "each seed"), rows))


if __name__ == "__main__":
    main()
