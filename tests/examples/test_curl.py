"""examples/curl.sh against a real server."""

import json
import os
import shutil
import subprocess

import pytest

from tests.conftest import REPOSITORY
from tests.service.exports import CLASSES

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
SAMPLES = REPOSITORY / "samples"


def curl(url: str, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(REPOSITORY / "examples/curl.sh"), *map(str, arguments)],
        env={**os.environ, "URL": url, "no_proxy": "127.0.0.1", **variables}, capture_output=True, text=True,
    )  # fmt: skip


def test_every_request_of_the_curl_example_is_answered_also_with_a_token(start_server, linear, tmp_path):
    (tmp_path / "tokens").write_text("secret\n")
    server = start_server("--model", linear, "--http-port", "0", "--token-file", tmp_path / "tokens").ready()
    done = curl(server.http_url, SAMPLES / "cat.jpg", SAMPLES / "ship.png", TOKEN="secret")  # noqa: S106
    assert done.returncode == 0, done.stdout + done.stderr
    answers = [line for line in done.stdout.splitlines() if line.startswith("{")]
    model, one, several, tensors = (json.loads(line) for line in answers[-4:])
    assert model["version"] == "linear-0"
    assert [ranked["name"] in CLASSES for ranked in one["results"][0]["classes"]] == [True] * 3
    assert [result["file"] for result in several["results"]] == ["cat.jpg", "ship.png"]
    assert {output["name"] for output in tensors["outputs"]} == {"logits", "probabilities"}

    refused = curl(server.http_url, TOKEN="wrong")  # noqa: S106
    assert refused.returncode != 0
    assert "401" in refused.stderr
    assert server.stop() == 0
