"""Fixtures for tests of all packages: generated data, folders of image files, the real images, and commands."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings
from PIL import Image

# The data sets need PyTorch. Tests of the client and the server run without it: `make test-oldest`.
if TYPE_CHECKING:
    from cifar_core.data import Dataset

REPOSITORY = Path(__file__).parents[1]

# The same examples in every run, and no time limit, so that a busy machine fails no test.
settings.register_profile("deterministic", deadline=None, derandomize=True)
settings.load_profile("deterministic")


@pytest.fixture(scope="session")
def small() -> "Dataset":
    """300 generated training and 100 test images."""
    from cifar_core.data import load_dataset

    return load_dataset("synthetic:300")


@pytest.fixture(scope="session")
def real() -> "Dataset":
    """The real images, if CIFAR10_DATA names them."""
    from cifar_core.data import load_dataset

    data = os.environ.get("CIFAR10_DATA")
    if not data:
        pytest.skip("needs the real images: set CIFAR10_DATA")
    return load_dataset(data)


@pytest.fixture(autouse=True)
def _own_cache(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
):
    """Keeps the user's cache free of folders that tests create; real images are cached there."""
    if "real" not in request.fixturenames:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def write_folder(dataset: "Dataset", folder: Path) -> Path:
    """Writes the images of a data set as PNG files, train/<class>/* and test/<class>/*."""
    for name, part in (("train", dataset.train), ("test", dataset.test)):
        for row, (image, label) in enumerate(zip(part.images, part.labels, strict=True)):
            class_folder = folder / name / dataset.classes[int(label)]
            class_folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.numpy()).save(class_folder / f"{row:05d}.png")
    return folder


@pytest.fixture
def image_folder(small: "Dataset", tmp_path: Path) -> Path:
    return write_folder(small, tmp_path / "pictures")


Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def command(tmp_path: Path) -> Command:
    """Runs `python -m MODULE ARGUMENT…` to its end, in an empty folder and without CIFAR10_DATA."""

    def run(module: str, *arguments: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(  # type: ignore[call-overload, no-any-return]
            command_line(module, arguments), cwd=tmp_path, env=environment(), capture_output=True, text=True, **options
        )

    return run


def prepared(statements: str, command: Sequence[str | Path]) -> list[str | Path]:
    """A command that executes Python statements and then becomes the given command, in the same process.

    Unlike with `preexec_fn`, nothing runs between fork and exec. There, gRPC starts the threads of this process again,
    and they fail with messages on standard error.

    Args:
        statements: may use the modules os, resource and signal.
        command: the program, by its path, and its arguments.
    """
    program = f"import os, resource, signal, sys; {statements}; os.execv(sys.argv[1], sys.argv[1:])"
    return [sys.executable, "-c", program, *command]


DEFAULT_SIGINT = "signal.signal(signal.SIGINT, signal.SIG_DFL)"
"""For `prepared`: a shell that starts the tests in the background ignores SIGINT, and programs inherit that."""


def command_line(module: str, arguments: Sequence[str | Path]) -> list[str]:
    return [sys.executable, "-m", module, *map(str, arguments)]


def environment() -> dict[str, str]:
    """The environment without CIFAR10_DATA, so that a command uses the data that the test names."""
    return {key: value for key, value in os.environ.items() if key != "CIFAR10_DATA"}
