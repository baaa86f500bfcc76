"""Metrics of ended workers: none is lost, and none slows a scrape."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.mmap_dict import MmapedDict
from prometheus_client.multiprocess import MultiProcessCollector

from service.core import statistics
from service.core.metrics import Metrics
from service.core.statistics import read_values
from service.workers.metric_files import MetricFiles
from tests.conftest import REPOSITORY

# A process that counts as a worker does, and is killed.
WORKER = """
import os, signal
from service.core.metrics import Metrics
metrics = Metrics()
metrics.on_request("m", "OK", 0.004)
metrics.on_images(3, 1)
metrics.on_batch(3, [0.001], 0.01, failed=False)
metrics.in_flight.inc()
os.kill(os.getpid(), signal.SIGKILL)
"""


def scrape(folder: Path) -> dict[str, float]:
    registry = CollectorRegistry()
    MultiProcessCollector(registry, str(folder))
    lines = generate_latest(registry).decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}


def scrape_seconds(folder: Path) -> float:
    times = []
    for _ in range(5):
        began = time.perf_counter()
        scrape(folder)
        times.append(time.perf_counter() - began)
    return min(times)


@pytest.fixture
def ended(tmp_path: Path) -> int:
    """The process id of an ended worker whose files are in tmp_path."""
    with subprocess.Popen(
        [sys.executable, "-c", WORKER], cwd=REPOSITORY, env={**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    ) as worker:
        worker.wait(60)
    return worker.pid


def copy(folder: Path, pid: int, other: int) -> None:
    """Files of another ended worker that counted the same."""
    for path in list(folder.glob(f"*_{pid}.db")):
        path.with_name(path.name.replace(f"_{pid}.db", f"_{other}.db")).write_bytes(path.read_bytes())


def test_values_of_an_ended_worker_stay_and_its_gauges_go(tmp_path, ended):
    before = scrape(tmp_path)
    assert before["cifar_service_requests_in_flight"] == 1
    MetricFiles(tmp_path).remove(ended)
    after = scrape(tmp_path)
    gauges = ("cifar_service_requests_in_flight", "cifar_service_waiting_images", "cifar_service_admitted_images")
    assert after == {name: value for name, value in before.items() if name not in gauges}
    assert after['cifar_service_request_seconds_bucket{le="0.005",method="m"}'] == 1
    assert not list(tmp_path.glob(f"*_{ended}.db"))


def test_a_scrape_after_1000_restarts_is_as_fast_as_the_first_and_counters_never_go_backwards(tmp_path, ended):
    files = MetricFiles(tmp_path)
    name = 'cifar_service_images_total{outcome="classified"}'
    copy(tmp_path, ended, 0)  # stays, as the files of a living worker do
    files.remove(ended)
    first = scrape_seconds(tmp_path)
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    seen = scrape(tmp_path)[name]
    for pid in range(100_000, 101_000):
        copy(tmp_path, 0, pid)
        if pid % 100 == 0:
            assert scrape(tmp_path)[name] == seen + 3
        files.remove(pid)
        if pid % 100 == 0:
            assert scrape(tmp_path)[name] == seen + 3
        seen += 3
    assert scrape(tmp_path)[name] == 3 * 1002
    assert scrape(tmp_path)['cifar_service_request_seconds_count{method="m"}'] == 1002
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) == size
    # 1,000 more files would take 500 times as long; a busy machine does not.
    assert scrape_seconds(tmp_path) < 10 * first + 0.1


def test_a_file_that_a_killed_worker_left_half_written_is_left_out(tmp_path, ended, caplog):
    files = MetricFiles(tmp_path)
    for pid, content in (
        (2, b""),
        (3, b"\x40"),
        (4, b"\xff\x00\x00\x00" + bytes(4) + b"\xff\x7f\x00\x00" + bytes(300)),
    ):
        (tmp_path / f"counter_{pid}.db").write_bytes(content)
        files.remove(pid)
        assert not (tmp_path / f"counter_{pid}.db").exists()
    files.remove(ended)
    assert scrape(tmp_path)['cifar_service_images_total{outcome="classified"}'] == 3
    assert "counter_2.db is damaged" in caplog.text


def test_what_could_not_be_merged_is_merged_with_the_next(tmp_path, ended, caplog):
    files = MetricFiles(tmp_path)
    before = scrape(tmp_path)["cifar_service_engine_images_total"]
    obstacle = tmp_path / "counter_ended.new"
    obstacle.mkdir()
    files.remove(ended)
    assert "not merged yet" in caplog.text
    assert scrape(tmp_path)["cifar_service_engine_images_total"] == before
    obstacle.rmdir()
    copy(tmp_path, ended, 2)
    files.remove(2)
    assert scrape(tmp_path)["cifar_service_engine_images_total"] == 2 * before
    assert not list(tmp_path.glob("counter_[0-9]*.db"))


def test_times_of_ended_workers_are_not_added_up(tmp_path, ended):
    copy(tmp_path, ended, 2)
    before, files = scrape(tmp_path), MetricFiles(tmp_path)
    files.remove(ended)
    files.remove(2)
    name = 'cifar_service_model_last_inference_timestamp_seconds{number="1"}'
    assert scrape(tmp_path)[name] == before[name] > 0


def test_the_last_inference_is_the_latest_of_all_workers(tmp_path, ended, monkeypatch):
    metrics = Metrics()
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    latest = metrics.statistics.read(1).last_inference
    assert latest > 0
    for pid in (1, 99_999_999):  # the first and the last by name
        copy(tmp_path, ended, pid)
        path = tmp_path / f"gauge_max_{pid}.db"
        file = MmapedDict(str(path))
        for key, value in read_values(path):
            file.write_value(key, value - 100, 0.0)
        file.close()
    assert metrics.statistics.read(1).last_inference == latest


def test_statistics_wait_while_the_values_of_an_ended_worker_are_in_no_file(tmp_path, ended, monkeypatch):
    metrics = Metrics()
    monkeypatch.setattr(statistics, "_ATTEMPTS", 10_000)  # the machine may be busy
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    merged = (tmp_path / f"counter_{ended}.db").rename(tmp_path / "counter_ended.new")
    threading.Timer(0.03, merged.rename, (tmp_path / "counter_ended.db",)).start()
    assert metrics.statistics.read(1).images == 3
