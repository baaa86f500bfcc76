"""What a user gets who installs the wheel: with all packages, and with those of the base installation alone."""

import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conftest import REPOSITORY

COMMANDS = ("cifar-serve", "cifar-classify", "cifar-train", "cifar-evaluate", "cifar-export")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the wheel was installed, and nothing else."""
    folder = tmp_path_factory.mktemp("wheel")
    # Without isolation and dependencies, because only what the wheel itself holds is tested.
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(REPOSITORY)],
        check=True, capture_output=True,
    )  # fmt: skip
    (wheel,) = folder.glob("*.whl")
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder / "installed"), str(wheel)],
        check=True,
    )
    return folder / "installed"


@pytest.fixture(scope="module")
def base(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with links to the packages that the wheel requires without an extra, and to those that they require."""
    folder = tmp_path_factory.mktemp("base")
    (metadata,) = installed.glob("*.dist-info")
    for distribution in requirements(importlib.metadata.PathDistribution(metadata)):
        for file in distribution.files or ():
            top = file.parts[0]
            source = Path(str(distribution.locate_file(top)))
            if top not in ("..", "__pycache__") and not (folder / top).exists():
                (folder / top).symlink_to(source)
    return folder


def requirements(distribution: importlib.metadata.Distribution) -> Iterator[importlib.metadata.Distribution]:
    """The installed packages that a package requires, directly or indirectly."""
    seen: set[str] = set()
    remaining = [distribution]
    while remaining:
        for text in remaining.pop().requires or ():
            requirement = Requirement(text)
            name = canonicalize_name(requirement.name)
            if name in seen or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
                continue
            seen.add(name)
            required = importlib.metadata.distribution(name)
            remaining.append(required)
            yield required


def run(
    installed: Path, folder: Path, *arguments: object, python: tuple[str, ...] = (), paths: tuple[Path, ...] = ()
) -> subprocess.CompletedProcess[str]:
    """Runs Python on the installed wheel, in a folder that holds no checkout."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (installed, *paths)))}
    return subprocess.run(
        [sys.executable, *python, *map(str, arguments)], cwd=folder, env=environment, capture_output=True, text=True
    )


def run_base(installed: Path, base: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs Python on the installed wheel and the base packages; -S leaves out all others."""
    return run(installed, base, *arguments, python=("-S",), paths=(base,))


# With all packages


def test_an_installed_wheel_serves_the_shipped_model_without_a_checkout(installed, tmp_path):
    code = "import service.settings as s; print(s.__file__, s.shipped_model())"
    where = run(installed, tmp_path, "-c", code).stdout.split()
    assert [Path(path).parent for path in where] == [installed / "service", installed / "service"]
    done = run(installed, tmp_path, "-m", "service.demo")
    assert done.returncode == 0, done.stderr
    assert "airplane.png" in done.stdout


def test_the_wheel_has_the_commands_that_the_documentation_names(installed):
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert tuple(project["scripts"]) == COMMANDS
    assert {path.name for path in (installed / "bin").iterdir()} >= set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_shows_the_name_that_the_user_typed(installed, tmp_path, command):
    done = run(installed, tmp_path, installed / "bin" / command, "--help")
    assert done.returncode == 0, done.stderr
    assert re.match(rf"usage: {command} \[", done.stdout)


@pytest.mark.parametrize(
    ("module", "wrong"),
    [
        ("service", ["--no-such-option"]),
        ("service.client", ["--help"]),
        ("cifar_core.train", ["--help"]),
        pytest.param("cifar_core.evaluate", ["--help"], marks=pytest.mark.slow),
        pytest.param("cifar_core.export", ["--help"], marks=pytest.mark.slow),
    ],
)
def test_the_help_of_a_module_shows_the_module(installed, tmp_path, module, wrong):
    done = run(installed, tmp_path, "-m", module, *wrong)
    assert f"python -m {module}" in done.stdout + done.stderr


def test_the_commands_serve_and_classify(installed, tmp_path):
    process = subprocess.Popen(
        [sys.executable, str(installed / "bin/cifar-serve"), "--port", "0", "--log-format", "json"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(installed)}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stderr
        port = json.loads(next(line for line in process.stderr if '"port"' in line))["port"]
        target, samples = f"127.0.0.1:{port}", installed / "service/samples"
        done = run(installed, tmp_path, installed / "bin/cifar-classify", "--server", target, "--json", samples)
        assert done.returncode == 0, done.stderr
        rows = [json.loads(line) for line in done.stdout.splitlines()]
        assert len(rows) == 7
        assert all(Path(row["image"]).stem == row["classes"][0]["name"] for row in rows)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
        assert process.returncode == 0
    finally:
        process.kill()


# With the base packages alone


def test_the_client_needs_only_the_base_packages(installed, base, server):
    cat = installed / "service/samples/cat.jpg"
    done = run_base(installed, base, installed / "bin/cifar-classify", "--server", server.target, cat)
    assert done.returncode == 0, done.stderr
    assert "cat.jpg" in done.stdout
    code = (
        "import sys, numpy\n"
        "from service import Client\n"
        f"with Client({server.target!r}) as client:\n"
        "    print(client.classify(numpy.zeros((1, 32, 32, 3), numpy.uint8), top_k=1)[0].best.name)\n"
        "print([name for name in ('pydantic', 'prometheus_client', 'onnxruntime', 'torch') if name in sys.modules])\n"
    )
    done = run_base(installed, base, "-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1] == "[]"


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        (["-m", "service"], "cpu"),
        (["-m", "service.demo"], "cpu"),
        (["-m", "service.probe"], "serve"),
        (["{bin}/cifar-serve"], "cpu"),
        (["{bin}/cifar-train", "deep"], "train"),
        (["{bin}/cifar-evaluate"], "train"),
        (["{bin}/cifar-export"], "cpu,train"),
    ],
)
def test_a_command_that_needs_an_extra_names_it_in_one_line(installed, base, arguments, extra):
    done = run_base(installed, base, *(argument.format(bin=installed / "bin") for argument in arguments))
    assert done.returncode == 2
    assert re.fullmatch(
        rf"error: the module \w+ is not installed: pip install 'cifar-classifier\[{extra}\]'\n", done.stderr
    )


def test_a_server_without_onnxruntime_names_the_extras_that_install_it(installed, base, tmp_path):
    for name in ("pydantic", "python-json-logger"):
        distribution = importlib.metadata.distribution(name)
        for required in (distribution, *requirements(distribution)):
            for file in required.files or ():
                if file.parts[0] not in ("..", "__pycache__") and not (tmp_path / file.parts[0]).exists():
                    (tmp_path / file.parts[0]).symlink_to(str(required.locate_file(file.parts[0])))
    done = run(installed, tmp_path, "-m", "service", python=("-S",), paths=(base, tmp_path))
    assert done.returncode == 2
    assert done.stderr == (
        "error: the module onnxruntime is not installed: pip install 'cifar-classifier[cpu]', or [cuda] or [openvino]\n"
    )
