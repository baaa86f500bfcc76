import json
import os
import subprocess

import numpy as np
import pytest

from tests.conftest import REPOSITORY
from tests.service.exports import expected

KSERVE = "CIFAR_KSERVE_PYTHON"


def test_the_kserve_sdks_rest_client_works_unchanged(http_server):
    python = os.environ.get(KSERVE)
    if not python:
        pytest.skip(f"needs the KServe SDK, which needs an environment of its own: set {KSERVE} to its interpreter")
    done = subprocess.run(
        [python, "tests/service/http/kserve_session.py", http_server.http_url],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert (seen["live"], seen["ready"], seen["model_ready"]) == (True, True, True)
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), np.uint8)
    for kind in ("json", "binary"):
        assert (seen[kind]["id"], seen[kind]["name"]) == (kind, "cifar10")
        given = np.array(seen[kind]["probabilities"]).reshape(5, 10)
        assert np.abs(given - expected(0, images)).max() < 1e-5
