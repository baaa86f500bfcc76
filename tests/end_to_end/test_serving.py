"""The service as a user meets it: the demo, the installed wheel, accuracy through gRPC."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cifar_core.data import Dataset
from cifar_core.evaluate import EvaluationError, choose_split, server_predictor
from service.client import Client
from tests.conftest import REPOSITORY
from tests.service.conftest import Server

SHIPPED = REPOSITORY / "exported"


def test_the_demo_classifies_the_sample_pictures_and_stops():
    done = subprocess.run(
        [sys.executable, "-m", "service.demo"],
        cwd=REPOSITORY, env={**os.environ, "CIFAR_SERVICE_PORT": "taken"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    version = json.loads((SHIPPED / "manifest.json").read_text())["model_version"]
    assert f"model {version}" in done.stdout
    assert "server stopped, exit code 0" in done.stdout
    for picture in (REPOSITORY / "samples").iterdir():
        assert (picture.name in done.stdout) == (picture.suffix != ".md")


@pytest.mark.parametrize("variant", ["fp32", "int8"])
def test_every_sample_picture_is_what_its_name_says(variant):
    server = Server("--model", SHIPPED, "--variant", variant).ready()
    shipped = json.loads((SHIPPED / "manifest.json").read_text())["variants"][variant]
    try:
        pictures = sorted(path for path in (REPOSITORY / "samples").iterdir() if path.suffix != ".md")
        with Client(server.target) as client:
            assert [answer.best.name for answer in client.classify(pictures)] == [path.stem for path in pictures]
            model = client.model()
        assert (model.variant, model.test_accuracy) == (variant, pytest.approx(shipped["test_accuracy"]))
    finally:
        assert server.stop() == 0


def test_a_wheel_installed_elsewhere_serves_the_shipped_model_without_a_checkout(tmp_path):
    # Without isolation and dependencies: what is tested is what the wheel itself holds.
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(REPOSITORY)],
        check=True, capture_output=True,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    elsewhere = tmp_path / "elsewhere"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(elsewhere), str(wheel)], check=True
    )
    environment = {**os.environ, "PYTHONPATH": str(elsewhere)}
    where = subprocess.run(
        [sys.executable, "-c", "import service.settings as s; print(s.__file__, s.shipped_model())"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    assert [Path(path).parent for path in where] == [elsewhere / "service", elsewhere / "service"]
    done = subprocess.run(
        [sys.executable, "-m", "service.demo"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "airplane.png" in done.stdout


def test_a_container_asks_for_health_by_a_command(server):
    def probe(target: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "service.probe", target], cwd=REPOSITORY, capture_output=True, text=True
        )

    assert probe(server.target).returncode == 0
    assert "SERVING" in probe(server.target).stdout
    assert probe("127.0.0.1:1").returncode == 1


def test_accuracy_is_measured_through_a_server(server, small: Dataset, command):
    done = command("cifar_core.evaluate", "--model", f"grpc://{server.target}", "--data", "synthetic:300")
    # The linear test model knows other classes than the generated data.
    assert done.returncode == 2
    assert "knows the classes airplane, automobile" in done.stderr
    predictor = server_predictor(server.target)
    logits, probabilities = predictor.predict(small.test.images.numpy())
    assert probabilities.shape == (len(small.test), 10)
    assert (logits.argmax(1) == probabilities.argmax(1)).all()
    with pytest.raises(EvaluationError, match="does not tell which images were held out"):
        choose_split(predictor, small, "validation")
    with pytest.raises(EvaluationError, match=r"start (a server|one) with: make serve"):
        server_predictor("127.0.0.1:1")


def test_accuracy_through_grpc_is_that_of_the_file(real: Dataset, tmp_path):
    del real  # only where there are real images
    server = Server("--model", SHIPPED).ready()
    try:
        results = []
        for place in (f"grpc://{server.target}", SHIPPED / "model.onnx"):
            file = tmp_path / "result.json"
            done = subprocess.run(
                [sys.executable, "-m", "cifar_core.evaluate", "--model", str(place), "--json", str(file)],
                cwd=REPOSITORY, capture_output=True, text=True,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            results.append(json.loads(file.read_text()))
    finally:
        assert server.stop() == 0
    through, direct = results
    assert through["images"] == 10_000
    assert through["correct"] == direct["correct"]
    assert through["confusion"] == direct["confusion"]
    assert through["data"] == direct["data"]
    assert through["loss"] == pytest.approx(direct["loss"], abs=1e-5)
