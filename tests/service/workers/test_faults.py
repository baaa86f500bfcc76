"""Failing workers and a failing system, with real processes: the supervisor stays, and replaces what failed."""

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest

from service.client import ClassificationError, Client, Options
from service.generated.cifar.v1 import image_classifier_pb2 as messages
from service.generated.cifar.v1 import image_classifier_pb2_grpc as rpc
from service.launch import ServerProcess
from tests.conftest import REPOSITORY, prepared
from tests.service.conftest import until
from tests.service.exports import expected, pictures, stalling
from tests.service.workers.test_supervisor import ask_workers, pids, running

CLASSIFIED = 'cifar_service_images_total{outcome="classified"}'


@contextlib.contextmanager
def asking(target: str, clients: int) -> Iterator[list[int]]:
    """Clients that ask and retry without pause; yields how many answers each has. Any failed call fails the test."""
    images = pictures(20)
    stop = threading.Event()
    problems: list[object] = []
    answered = [0] * clients

    def ask(place: int) -> None:
        try:
            while not stop.is_set():
                with Client(target, Options(timeout=60)) as client:  # a new connection each time
                    probabilities = client.probabilities(images)
                if np.abs(probabilities - expected(0, images)).max() > 1e-5:
                    problems.append("a wrong answer")
                answered[place] += 1
        except (ClassificationError, ValueError) as error:
            problems.append(error)

    threads = [threading.Thread(target=ask, args=(place,)) for place in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield answered
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert problems == []


def test_a_stopped_worker_is_replaced_within_5_seconds_and_clients_that_retry_lose_nothing(start_server, linear):
    began = time.monotonic()
    server = start_server("--model", linear, "--workers", "2", "--metrics-port", "0").ready()
    start_seconds = time.monotonic() - began
    with asking(server.target, 4) as answered:
        until(lambda: all(answered))
        began = time.monotonic()
        os.kill(pids(server)["1"], signal.SIGSTOP)
        server.wait_for("worker 1 is killed: it has been stopped for")
        server.wait_for('"serving .*"worker": 1', count=2)
        # On a machine so busy that a start alone takes seconds, the start is not what is tested.
        assert time.monotonic() - began < max(5.0, 3.0 + 2 * start_seconds)
        seen = list(answered)
        until(lambda: all(after > before for before, after in zip(seen, answered, strict=True)))
    metrics = server.metrics()
    assert metrics["cifar_service_worker_restarts_total"] == 1
    assert metrics['cifar_service_worker_failures_total{reason="hang"}'] == 1
    assert server.stop() == 0


def test_a_worker_that_dies_of_a_signal_without_a_name_is_replaced(start_server, linear):
    server = start_server("--model", linear, "--workers", "2", "--metrics-port", "0").ready()
    os.kill(pids(server)["1"], 40)
    server.wait_for("worker 1 ended: signal 40; another starts in 0.1 s")
    server.wait_for('"serving .*"worker": 1', count=2)
    assert server.metrics()['cifar_service_worker_failures_total{reason="signal"}'] == 1
    assert server.stop() == 0


def test_a_worker_that_cannot_be_started_for_want_of_file_descriptors_is_tried_again(start_server, linear):
    server = start_server("--model", linear, "--workers", "2", "--metrics-port", "0").ready()
    ask_workers(server, 5)
    limits = resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (4, limits[1]))
    os.kill(pids(server)["1"], signal.SIGKILL)
    server.wait_for("worker 1 ended: .*cannot be started: Too many open files; another starts in 0.4 s")
    assert server.process.poll() is None
    ask_workers(server, 5)
    assert "worker 2 ended" not in server.log
    resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, limits)
    server.wait_for('"serving .*"worker": 1', count=2)
    metrics = server.metrics()
    assert metrics[CLASSIFIED] == 10
    assert metrics['cifar_service_worker_failures_total{reason="start"}'] >= 2
    assert server.stop() == 0


@pytest.fixture
def short() -> Iterator[Path]:
    """An empty folder with a short name: paths of sockets have at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="t-") as name:
        yield Path(name)


def test_counters_survive_restarts_and_the_number_of_files_does_not_grow(start_server, linear, short):
    server = start_server(
        "--model", linear, "--workers", "2", "--metrics-port", "0", environment={"TMPDIR": str(short)}
    ).ready()
    files = []
    for restart in range(1, 4):
        ask_workers(server, 5)
        os.kill(pids(server)["1"], signal.SIGKILL)
        server.wait_for('"serving .*"worker": 1', count=restart + 1)
        assert server.metrics()[CLASSIFIED] == 5 * restart
        assert next(value for name, value in server.metrics().items() if "model_info" in name) == 2
        files.append(len(list(short.rglob("*.db"))) + len(list(short.rglob("pymp-*"))))
    assert files[0] == files[1] == files[2]
    assert server.stop() == 0
    assert not [path for path in short.iterdir() if path.is_dir()]


def test_the_pauses_grow_for_workers_that_serve_only_for_a_moment(start_server, linear):
    server = start_server("--model", linear, "--workers", "2").ready()
    for count, delay in ((2, "0.1"), (3, "0.2"), (4, "0.4")):
        os.kill(pids(server)["1"], signal.SIGKILL)
        server.wait_for(f"worker 1 ended: signal SIGKILL; another starts in {delay} s")
        server.wait_for('"serving .*"worker": 1', count=count)
    assert server.stop() == 0


def busy(server: ServerProcess, channel: grpc.Channel) -> grpc.Future:
    """A request that takes its worker many seconds."""
    call = rpc.ImageClassifierStub(channel).Classify.future(messages.ClassifyRequest(packed_rgb=stalling(8).tobytes()))
    until(lambda: server.metrics()["cifar_service_requests_in_flight"] == 1)
    return call


def test_a_second_signal_ends_supervisor_and_workers_at_once(start_server, slow, short):
    server = start_server(
        "--model", slow, "--workers", "2", "--max-batch-size", "1", "--metrics-port", "0",
        environment={"TMPDIR": str(short)},
    ).ready()  # fmt: skip
    workers = pids(server)
    with grpc.insecure_channel(server.target) as channel:
        busy(server, channel)
        server.process.send_signal(signal.SIGTERM)
        server.wait_for('"stopping: ', count=2)
        began = time.monotonic()
        assert server.stop() == 128 + signal.SIGTERM
        assert time.monotonic() - began < 10  # not the grace period of 30 s
    until(lambda: not any(running(pid) for pid in workers.values()), 10)
    assert not [path for path in short.iterdir() if path.is_dir()]


# As process 1 of a container


@pytest.fixture
def container(slow: Path) -> Iterator[ServerProcess]:
    """A server whose supervisor is process 1 of a process namespace, as in a container."""
    prefix = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
    try:
        subprocess.run([*prefix, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        prefix[1:1] = ["--user", "--map-root-user"]
        try:
            subprocess.run([*prefix, "true"], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("needs the right to make a process namespace (unshare)")
    server = ServerProcess(
        "--model", slow, "--workers", "2", "--max-batch-size", "1", "--metrics-port", "0",
        folder=REPOSITORY, prefix=prefix,
    )  # fmt: skip
    try:
        yield server.ready()
    finally:
        server.kill()


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_second_sigterm_ends_a_supervisor_that_is_process_1(container):
    (supervisor,) = children(container.process.pid)
    workers = children(supervisor)
    assert len(workers) == 2
    with grpc.insecure_channel(container.target) as channel:
        busy(container, channel)
        os.kill(supervisor, signal.SIGTERM)
        container.wait_for('"stopping: ', count=2)
        began = time.monotonic()
        os.kill(supervisor, signal.SIGTERM)
        assert container.wait() == 128 + signal.SIGTERM
        assert time.monotonic() - began < 10  # not the grace period of 30 s
    assert not any(running(pid) for pid in workers)


def test_process_1_stops_in_order_at_the_first_signal_and_replaces_workers(container):
    (supervisor,) = children(container.process.pid)
    os.kill(children(supervisor)[0], signal.SIGKILL)
    container.wait_for("worker . ended: signal SIGKILL")
    container.wait_for('"serving ', count=3)
    os.kill(supervisor, signal.SIGTERM)
    assert container.wait() == 0


def test_process_1_leaves_no_zombies_of_processes_that_others_left_behind(container):
    (supervisor,) = children(container.process.pid)
    script = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(0.5)'])"
    nsenter = shutil.which("nsenter") or pytest.skip("needs nsenter")
    subprocess.run([nsenter, "--target", str(supervisor), "--pid", "--mount", sys.executable, "-c", script], check=True)
    until(lambda: len(children(supervisor)) == 3)  # the orphan is its child now
    until(lambda: len(children(supervisor)) == 2)
    os.kill(supervisor, signal.SIGTERM)
    assert container.wait() == 0


def test_without_a_folder_for_temporary_files_it_says_so_in_one_line(linear):
    done = subprocess.run(
        prepared(
            "resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))",  # no file can be written to
            [sys.executable, "-m", "service", "--model", linear, "--port", "0", "--workers", "2"],
        ),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: --workers 2 needs a folder for temporary files")
    assert "TMPDIR" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_workers_that_get_almost_no_cpu_are_not_killed(start_server, linear):
    server = start_server("--model", linear, "--workers", "2").ready()
    for pid in (server.process.pid, *pids(server).values()):
        os.setpriority(os.PRIO_PROCESS, pid, 19)
    hogs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(6 * (os.cpu_count() or 1))]
    try:
        time.sleep(20)
    finally:
        for hog in hogs:
            hog.kill()
            hog.wait()
    ask_workers(server, 5)
    assert "is killed" not in server.log
    assert server.stop() == 0
