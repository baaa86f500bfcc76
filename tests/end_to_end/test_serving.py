"""The service as a user meets it: the demo, the container's health check, accuracy over gRPC."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cifar_core.data import Dataset
from cifar_core.evaluate import EvaluationError, choose_split
from cifar_core.predictors import PredictorError, server_predictor
from service.client import Client
from tests.conftest import REPOSITORY
from tests.service.conftest import Server

SHIPPED = REPOSITORY / "exported"


def sample_images() -> list[Path]:
    return sorted(path for path in (REPOSITORY / "samples").iterdir() if path.suffix != ".md")


def test_the_demo_classifies_the_sample_images_and_stops_its_server():
    done = subprocess.run(
        [sys.executable, "-m", "service.demo"],
        cwd=REPOSITORY, env={**os.environ, "CIFAR_SERVICE_PORT": "taken"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    version = json.loads((SHIPPED / "manifest.json").read_text())["model_version"]
    assert f"model {version}" in done.stdout
    assert "server stopped, exit code 0" in done.stdout
    for image in sample_images():
        assert image.name in done.stdout
    assert "README.md" not in done.stdout


def test_the_demo_names_an_image_that_cannot_be_read():
    done = subprocess.run(
        [sys.executable, "-m", "service.demo", "absent.png"], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr == "error: these images cannot be read: absent.png: No such file or directory\n"


def test_the_demo_ends_without_a_traceback_if_nobody_reads_its_output():
    process = subprocess.Popen(
        [sys.executable, "-m", "service.demo"], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout
    process.stdout.close()
    _, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (1, b"")


@pytest.mark.parametrize("variant", ["fp32", "int8"])
def test_the_class_of_every_sample_image_is_the_one_in_its_file_name(variant):
    server = Server("--model", SHIPPED, "--variant", variant).ready()
    shipped = json.loads((SHIPPED / "manifest.json").read_text())["variants"][variant]
    try:
        with Client(server.target) as client:
            answers = client.classify(sample_images())
            assert [answer.best.name for answer in answers] == [path.stem for path in sample_images()]
            model = client.model()
        assert (model.variant, model.test_accuracy) == (variant, pytest.approx(shipped["test_accuracy"]))
        assert server.stop() == 0
    finally:
        server.kill()


def test_the_health_check_of_the_container_follows_the_servers_variables(start_server, linear, tmp_path):
    dockerfile = (REPOSITORY / "Dockerfile").read_text()
    found = re.search(r"^HEALTHCHECK .*CMD (\[.*\])$", dockerfile, re.MULTILINE)
    assert found
    interpreter, *arguments = json.loads(found[1])
    assert interpreter.endswith("/python")
    (tmp_path / "tokens").write_text("secret\n")
    server = start_server("--model", linear, environment={"CIFAR_SERVICE_TOKEN_FILE": str(tmp_path / "tokens")}).ready()

    def health(**variables: str) -> int:
        environment = {**os.environ, "CIFAR_SERVICE_PORT": str(server.port), "CIFAR_SERVICE_HOST": "0.0.0.0"}  # noqa: S104
        return subprocess.run(
            [sys.executable, *arguments], cwd=REPOSITORY, env={**environment, **variables}, capture_output=True
        ).returncode

    assert health(CIFAR_SERVICE_TOKEN_FILE=str(tmp_path / "tokens")) == 0
    assert health() == 1
    assert server.stop() == 0
    assert health(CIFAR_SERVICE_TOKEN_FILE=str(tmp_path / "tokens")) == 1


def test_a_model_is_evaluated_through_a_server(server, small: Dataset, command):
    done = command("cifar_core.evaluate", "--model", f"grpc://{server.target}", "--data", "synthetic:300")
    assert done.returncode == 2
    assert "has the classes airplane, automobile" in done.stderr  # the generated data has others
    predictor = server_predictor(server.target)
    logits, probabilities = predictor.predict(small.test.images.numpy())
    assert probabilities.shape == (len(small.test), 10)
    assert (logits.argmax(1) == probabilities.argmax(1)).all()
    with pytest.raises(EvaluationError, match="does not say which images were held out"):
        choose_split(predictor, small, "validation")
    with pytest.raises(PredictorError, match=r"does not answer .*start a server with: make serve"):
        server_predictor("127.0.0.1:1")


@pytest.mark.slow
def test_the_accuracy_through_a_server_equals_that_of_the_file(real: Dataset, tmp_path):
    del real  # needed only because the test is skipped where there are no real images
    server = Server("--model", SHIPPED).ready()
    try:
        results = []
        for model in (f"grpc://{server.target}", SHIPPED / "model.onnx"):
            file = tmp_path / "result.json"
            done = subprocess.run(
                [sys.executable, "-m", "cifar_core.evaluate", "--model", str(model), "--json", str(file)],
                cwd=REPOSITORY, capture_output=True, text=True,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            results.append(json.loads(file.read_text()))
        assert server.stop() == 0
    finally:
        server.kill()
    through, direct = results
    assert through["images"] == 10_000
    assert through["correct"] == direct["correct"]
    assert through["confusion"] == direct["confusion"]
    assert through["data"] == direct["data"]
    assert through["loss"] == pytest.approx(direct["loss"], abs=1e-5)
