"""A sweep on a Ray cluster gives the runs of a local one, also when a worker and a node are killed."""

import re
import subprocess
import time

import psutil
import pytest

from cifar_core.errors import CifarError
from cifar_core.run_folder import RunFolder
from cifar_core.sweep.command import main
from tests.cifar_core.training import assert_same_run
from tests.conftest import command_line, environment
from tests.ray_cluster import two_nodes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(540)]

SWEEP = [
    "baseline",
    "dropout-0.2",
    "--seeds",
    "0-2",
    "--set",
    "epochs=4",
    "--set",
    "batch_size=8",
    "--data",
    "synthetic:400",
]


@pytest.fixture
def cluster():
    with two_nodes() as nodes:
        yield nodes


def training() -> dict[psutil.Process, psutil.Process]:
    """The Ray workers that train, each with its training process."""
    found = {}
    for process in psutil.process_iter(["cmdline"]):
        if "cifar_core.sweep.child" in (process.info["cmdline"] or []):
            parent = process.parent()
            if parent is not None:
                found[parent] = process
    return found


def test_a_worker_and_a_node_are_killed_and_all_histories_are_those_of_a_local_sweep(tmp_path, cluster):
    assert main([*SWEEP, "--runs", str(tmp_path / "local")]) == 0
    run = subprocess.Popen(
        command_line("cifar_core.sweep", [*SWEEP, "--runs", tmp_path / "cluster", "--ray", cluster.address]),
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        wait_until(lambda: len(training()) == 2 and epochs(tmp_path / "cluster") >= 2, run)
        worker, child = next(iter(training().items()))
        worker.kill()
        child.wait(60)  # it ends with its worker
        saved = epochs(tmp_path / "cluster")
        wait_until(lambda: epochs(tmp_path / "cluster") > saved and len(training()) == 2, run)
        cluster.remove_node(cluster.second, allow_graceful=False)
        later = epochs(tmp_path / "cluster")
        said, _ = run.communicate(timeout=300)
    finally:
        run.kill()
    assert run.returncode == 0, said
    assert later < 24, "all runs had ended before the node was killed"
    assert re.search(r"\| baseline\+batch_size=8\+epochs=4 +\| 3 of 3", said)
    print(f"epochs saved: {saved} of 24 when a worker was killed, {later} when a node was killed")
    local = sorted(path.parent for path in (tmp_path / "local").glob("*/*/recipe.json"))
    assert len(local) == 6
    for path in local:
        assert_same_run(RunFolder(tmp_path / "cluster" / path.relative_to(tmp_path / "local")), RunFolder(path))
    print(f"{len(local)} runs: weights, optimizer states and histories equal those of the local sweep")


def test_a_run_that_needs_more_cores_than_this_machine_has_is_refused(tmp_path):
    with pytest.raises(CifarError, match=r"no machine of the Ray cluster has the 9999 CPU\(s\) that a run needs"):
        main(["baseline", "--data", "synthetic:400", "--threads", "9999", "--runs", str(tmp_path), "--ray"])


def epochs(runs) -> int:
    """Number of epochs that all runs have saved."""
    return sum(len(RunFolder(path.parent).history()) for path in runs.glob("*/*/history.jsonl"))


def wait_until(condition, run, seconds=180.0):
    end = time.monotonic() + seconds
    while not condition():
        assert run.poll() is None, run.communicate()[0]
        assert time.monotonic() < end, "the condition did not hold in time"
        time.sleep(0.02)
