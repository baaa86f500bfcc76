"""The client in examples/typescript, built with Node and run against a real server. npm must reach its registry."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
import trustme

from service.client import Client
from tests.conftest import REPOSITORY
from tests.service.client.scripted import Scripted, serve
from tests.service.exports import CLASSES

pytestmark = [
    pytest.mark.slow,  # npm install
    pytest.mark.skipif(shutil.which("npm") is None, reason="needs Node and npm: apt-get install nodejs npm"),
    pytest.mark.timeout(600),
]
SAMPLES = REPOSITORY / "samples"
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def classify(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs the command of the example, which was built in a copy of the repository."""
    copy = tmp_path_factory.mktemp("typescript")
    shutil.copytree(REPOSITORY / "protos", copy / "protos")
    built = shutil.ignore_patterns("node_modules", "dist", "generated", "package-lock.json")
    shutil.copytree(REPOSITORY / "examples/typescript", copy / "examples/typescript", ignore=built)
    for step in (["install", "--no-audit", "--no-fund"], ["run", "build"]):
        folder = copy / "examples/typescript"
        done = subprocess.run(["npm", *step], cwd=folder, capture_output=True, text=True)  # noqa: S607
        assert done.returncode == 0, done.stdout + done.stderr

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["node", str(copy / "examples/typescript/dist/classify.js"), *map(str, arguments)],  # noqa: S607
            env={**os.environ, "no_grpc_proxy": "127.0.0.1,localhost"}, capture_output=True, text=True,
        )  # fmt: skip

    return run


def rows_of(done: subprocess.CompletedProcess[str]) -> list[dict]:
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_files_are_classified_as_by_our_own_client_and_a_bad_file_costs_its_own_row(classify, server, tmp_path):
    (tmp_path / "damaged.png").write_bytes(b"no image")
    files = [SAMPLES / "cat.jpg", tmp_path / "absent.png", tmp_path / "damaged.png", SAMPLES / "ship.png"]
    done = classify("--server", server.target, "--top-k", "2", *files)
    assert done.returncode == 1, done.stderr
    cat, absent, damaged, ship = rows_of(done)
    with Client(server.target) as client:
        for row, answer in zip((cat, ship), client.classify([files[0], files[3]], top_k=2), strict=True):
            assert row["error"] is None
            assert [ranked["name"] for ranked in row["classes"]] == [ranked.name for ranked in answer.classes]
            assert row["classes"][0]["probability"] == pytest.approx(answer.best.probability)
    assert "no such file" in absent["error"]
    assert "its header is damaged" in damaged["error"]


def test_long_lists_are_sent_in_requests_that_the_server_accepts(classify):
    servicer = Scripted()  # it accepts 10 images and 100,000 bytes
    with serve(servicer) as target:
        done = classify("--server", target, *[SAMPLES / "bird.png"] * 150)
    assert done.returncode == 0, done.stderr
    assert len(rows_of(done)) == sum(servicer.calls) == 150


def test_a_request_that_the_server_could_not_accept_is_sent_again(classify):
    overloaded = (grpc.StatusCode.RESOURCE_EXHAUSTED, (("grpc-retry-pushback-ms", "20"),))
    servicer = Scripted(overloaded, (grpc.StatusCode.UNAVAILABLE, ()))
    with serve(servicer) as target:
        done = classify("--server", target, SAMPLES / "bird.png")
    assert done.returncode == 0, done.stderr
    assert len(servicer.calls) == 3


def test_the_deadline_ends_a_call(classify):
    servicer = Scripted()
    servicer.seconds = 5
    with serve(servicer) as target:
        done = classify("--server", target, "--timeout", "0.5", SAMPLES / "bird.png")
    assert (done.returncode, done.stdout) == (2, "")
    assert "DEADLINE_EXCEEDED" in done.stderr


def test_tls_and_a_token_work_and_a_token_is_not_sent_in_plaintext_to_another_machine(
    classify, start_server, linear, tmp_path: Path
):
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    certificate.private_key_and_cert_chain_pem.write_to_path(tmp_path / "server.pem")
    (tmp_path / "tokens").write_text("secret\n")
    (tmp_path / "other").write_text("other\n")
    server = start_server(
        "--model", linear, "--tls-cert", tmp_path / "server.pem", "--tls-key", tmp_path / "server.pem",
        "--token-file", tmp_path / "tokens",
    ).ready()  # fmt: skip
    target = ("--server", f"localhost:{server.port}", "--ca", tmp_path / "ca.pem")
    done = classify(*target, "--token-file", tmp_path / "tokens", SAMPLES / "cat.jpg")
    assert done.returncode == 0, done.stderr
    assert rows_of(done)[0]["classes"][0]["name"] in CLASSES
    refused = classify(*target, "--token-file", tmp_path / "other", SAMPLES / "cat.jpg")
    assert refused.returncode == 2
    assert "UNAUTHENTICATED" in refused.stderr
    plain = classify("--server", "classifier.example:1", "--token-file", tmp_path / "tokens", SAMPLES / "cat.jpg")
    assert plain.returncode == 2
    assert "without encryption" in plain.stderr
    assert server.stop() == 0
