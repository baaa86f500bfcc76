import json
import os
import subprocess

import numpy as np
import pytest

from tests.conftest import REPOSITORY
from tests.service.exports import expected

KSERVE = "CIFAR_KSERVE_PYTHON"


def test_the_kserve_sdks_grpc_client_works_unchanged(server):
    python = os.environ.get(KSERVE)
    if not python:
        pytest.skip(f"needs the KServe SDK in an environment of its own: set {KSERVE} to its interpreter")
    done = subprocess.run(
        [python, "tests/service/rpc/kserve_session.py", server.target],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    ready = [seen[name] for name in ("live", "ready", "model_ready", "other_model_ready")]
    assert ready == [True, True, True, False]
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), np.uint8)
    for kind in ("typed", "raw"):
        assert (seen[kind]["id"], seen[kind]["version"]) == (kind, "1")
        given = np.array(seen[kind]["probabilities"]).reshape(5, 10)
        # The model fails on images that begin with the byte 255, and none of these does.
        assert np.abs(given - expected(0, images)).max() < 1e-5
    assert seen["error"] == "StatusCode.NOT_FOUND"
