"""Scoring on Ray gives the rows of a local run, also when an actor or a node of the cluster is killed."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cifar_core.pixels import ImageLimits
from service.score.errors import ScoreError
from service.score.output import OutputFolder
from service.score.progress import ScoreProgress
from service.score.scorer import ScoreOptions
from tests.ray_cluster import ray, two_nodes
from tests.service import exports
from tests.service.score.pictures import command, environment, packed, rows, score, write_images

pytestmark = [pytest.mark.slow, pytest.mark.timeout(420)]


@pytest.fixture(scope="module")
def source(tmp_path_factory, linear):
    """A folder of images, of which one is damaged, and the rows of a local run."""
    folder = tmp_path_factory.mktemp("images")
    write_images(folder, exports.pictures(600))
    (folder / "00300.png").write_bytes(b"damaged")
    output = tmp_path_factory.mktemp("local") / "out"
    assert score(folder, output, "--rows-per-part", 50, model=linear) == 1
    return folder, rows(output)


def test_ray_on_one_machine_gives_the_rows_of_a_local_run(tmp_path, linear, source):
    folder, expected = source
    assert score(folder, tmp_path / "out", "--rows-per-part", 50, "--ray", model=linear) == 1
    assert rows(tmp_path / "out").equals(expected)


def test_a_run_that_was_begun_here_is_continued_on_ray(tmp_path, linear, source):
    folder, expected = source
    assert score(folder, tmp_path / "out", "--rows-per-part", 50, model=linear) == 1
    for part in (1, 5, 11):
        (tmp_path / f"out/part-{part:06d}.parquet").unlink()
    assert score(folder, tmp_path / "out", "--rows-per-part", 50, "--resume", "--ray", model=linear) == 1
    assert rows(tmp_path / "out").equals(expected)


def test_a_list_with_relative_paths_is_found_by_the_actors(tmp_path, linear, source, monkeypatch):
    folder, expected = source
    (tmp_path / "list").write_text("\n".join(sorted(file.name for file in folder.iterdir())))
    monkeypatch.chdir(folder)
    assert score(tmp_path / "list", tmp_path / "out", "--rows-per-part", 50, "--ray", model=linear) == 1
    assert rows(tmp_path / "out").equals(expected)


def test_an_error_of_an_actor_is_reported_as_in_a_local_run(tmp_path, linear):
    file = tmp_path / "in.parquet"
    pq.write_table(
        pa.table({"image": packed(exports.pictures(50))}),
        file,
        use_dictionary=False,
        row_group_size=25,
    )
    content = bytearray(file.read_bytes())
    start = pq.read_metadata(file).row_group(1).column(0).data_page_offset
    content[start : start + 30] = bytes(30)
    file.write_bytes(content)
    with pytest.raises(ScoreError, match=r"in\.parquet: row group 1 cannot be read after row 0"):
        score(file, tmp_path / "out", "--content", "pixels", "--ray", model=linear)


def test_a_model_that_was_replaced_during_the_run_is_reported_as_one_line(tmp_path, linear, source):
    from service.score.cluster import score_on_cluster

    options = ScoreOptions(linear, "fp32", "cpu", 1, 1, 32, 50, ImageLimits(2**20, 2**20), 1.0)
    where = (source[0], None, "auto", None)
    with pytest.raises(ScoreError, match=r"^[^\n]+: the model was replaced during the run; restore it and use .*$"):
        score_on_cluster("local", where, OutputFolder(tmp_path / "out"), options, "other", [0], ScoreProgress(50, 0))


def test_an_address_without_a_cluster_is_refused_and_the_message_names_the_address_that_ray_uses(
    tmp_path, linear, source
):
    refused = f"nothing answers at {re.escape(ray.util.get_node_ip_address())}:1 "
    with pytest.raises(ScoreError, match=f"--ray localhost:1: cannot connect to a Ray cluster there: {refused}"):
        score(source[0], tmp_path / "out", "--ray", "localhost:1", model=linear)


@pytest.fixture
def cluster():
    with two_nodes() as nodes:
        yield nodes


def actors() -> list[psutil.Process]:
    """The processes of Ray's actors that score, on all nodes of this machine."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        title = " ".join(process.info["cmdline"] or [])
        if title.startswith("ray::") and "ScorerActor" in title:
            found.append(process)
    return found


def test_an_actor_and_then_a_node_are_killed_and_no_row_is_lost_or_doubled(tmp_path, slow, cluster):
    images = exports.pictures(640)
    images[::40, 0, 0, 0] = exports.STALLING  # these batches take about a second
    write_images(tmp_path / "in", images)
    options = ("--rows-per-part", 20, "--batch-size", 20)
    assert score(tmp_path / "in", tmp_path / "local", *options, model=slow) == 0
    output = tmp_path / "out"
    run = subprocess.Popen(
        # Ray replaces localhost by the address of the machine.
        command(tmp_path / "in", output, *options, "--ray", f"localhost:{port(cluster)}", model=slow),
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        wait_until(lambda: len(parts(output)) >= 2 and len(actors()) == 2, run)
        os.kill(actors()[0].pid, signal.SIGKILL)
        written = len(parts(output))
        wait_until(lambda: len(parts(output)) > written and len(actors()) == 2, run)
        cluster.remove_node(cluster.second, allow_graceful=False)
        left = 32 - len(parts(output))
        said, _ = run.communicate(timeout=240)
    finally:
        run.kill()
    assert run.returncode == 0, said
    assert left > 0, "all parts were written before the node was killed"
    found = rows(output)
    assert found.equals(rows(tmp_path / "local"))
    print(f"parts written: {written} of 32 when an actor was killed, {32 - left} when a node was killed")
    names = set(found["path"].to_pylist())
    print(f"{len(found)} rows of {len(names)} images, all as in a local run of {len(images)} images")


def test_a_cluster_with_a_token_says_what_a_run_without_it_needs(tmp_path, linear, source, cluster):
    run = subprocess.run(
        command(source[0], tmp_path / "out", "--ray", cluster.address, model=linear),
        env=environment() | {"RAY_AUTH_MODE": "disabled"}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert run.returncode == 2
    last = run.stderr.splitlines()[-1]
    assert last.startswith(f"error: --ray {cluster.address}: cannot connect to a Ray cluster there")
    assert "set RAY_AUTH_MODE=token" in last


def port(cluster) -> str:
    return cluster.address.rpartition(":")[2]


def parts(output: Path) -> list[Path]:
    return list(output.glob("part-*"))


def wait_until(condition, run, seconds=180.0):
    end = time.monotonic() + seconds
    while not condition():
        assert run.poll() is None, run.communicate()[0]
        assert time.monotonic() < end, "the condition did not hold in time"
        time.sleep(0.05)


def test_the_cluster_tests_leave_no_ray_behind():
    assert not ray.is_initialized()
