"""Inputs for tests of offline scoring, and what the model of `exports.graph(0)` says about them."""

import os
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from service.score.command import main
from tests.service import exports

REPOSITORY = Path(__file__).parents[3]


def write_images(folder, images, names=None):
    """Writes images as PNG files and returns their names."""
    folder.mkdir(parents=True, exist_ok=True)
    names = names or [f"{number:05d}.png" for number in range(len(images))]
    for name, image in zip(names, images, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / name)
    return names


def score(*arguments, model):
    """Runs the command in this process; returns its exit code."""
    return main([*map(str, arguments), "--model", str(model)])


def command(*arguments, model):
    """The command line for a process of its own."""
    return [sys.executable, "-m", "service.score", *map(str, arguments), "--model", str(model)]


def environment():
    return {**os.environ, "PYTHONPATH": str(REPOSITORY)}


def rows(output):
    """All rows of an output, in order of the parts."""
    return pq.read_table(output)


def assert_classified(table, images, seed=0):
    """Checks classes and probabilities against those that NumPy computes."""
    expected = exports.expected(seed, images)
    np.testing.assert_allclose(np.array(table["probabilities"].to_pylist()), expected, atol=1e-5)
    assert table["class"].to_pylist() == [exports.CLASSES[row] for row in expected.argmax(axis=1)]
    assert table["error"].null_count == len(images)


def packed(images):
    """Images as a column of the type that image data sets in Parquet use most: binary, 3,072 bytes each."""
    return pa.array([image.tobytes() for image in images], pa.binary())
