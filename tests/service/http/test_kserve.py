import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import REPOSITORY
from tests.service.exports import expected

# Made by `make kserve-sdk`.
OWN_ENVIRONMENT = REPOSITORY / ".venv-kserve/bin/python"


@pytest.fixture(scope="module")
def sdk() -> Path:
    """An interpreter that has KServe's SDK."""
    if importlib.util.find_spec("kserve"):
        return Path(sys.executable)
    if OWN_ENVIRONMENT.exists():
        return OWN_ENVIRONMENT
    pytest.skip("KServe's SDK is not installed: make kserve-sdk")


def test_the_kserve_sdks_rest_client_works_unchanged(http_server, sdk):
    done = subprocess.run(
        [sdk, "tests/service/http/kserve_session.py", http_server.http_url],
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
