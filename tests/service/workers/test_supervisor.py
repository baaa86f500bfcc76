"""Several workers under a supervisor: one port, one page of metrics, signals, and replacing workers that end."""

import os
import signal
import threading
import time
from pathlib import Path

import grpc
import numpy as np

from service.client import ClassificationError, Client, Options
from service.generated.cifar.v1 import image_classifier_pb2 as messages
from service.generated.cifar.v1 import image_classifier_pb2_grpc as rpc
from tests.service import exports
from tests.service.exports import expected, pictures


def pids(server) -> dict[str, int]:
    """Process ids of the workers by number: the supervisor's children, as the kernel lists them."""
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    workers = {}
    for child in children:
        arguments = Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")
        if b"service.workers" in arguments:
            workers[arguments[arguments.index(b"service.workers") + 2].decode()] = int(child)
    return workers


def ask_workers(server, connections: int = 20) -> None:
    """Sends one request over each of several connections, so that each worker gets some of them."""
    for _ in range(connections):
        with grpc.insecure_channel(server.target, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            rpc.ImageClassifierStub(channel).Classify(messages.ClassifyRequest(packed_rgb=bytes(3072)))


def test_workers_share_the_port_and_their_metrics_are_shown_together(start_server, linear):
    server = start_server("--model", linear, "--workers", "2", "--metrics-port", "0", "--log-level", "debug").ready()
    assert len(pids(server)) == 2
    ask_workers(server)
    lines = [line for line in server.lines if '"request"' in line]
    assert any('"worker": 1' in line for line in lines)
    assert any('"worker": 2' in line for line in lines)
    metrics = server.metrics()
    assert metrics['cifar_service_requests_total{code="OK",method="cifar.v1.ImageClassifier/Classify"}'] == 20
    assert metrics["cifar_service_engine_images_total"] == 20
    assert next(value for name, value in metrics.items() if name.startswith("cifar_service_model_info")) == 2
    for process in ("supervisor", "worker-1", "worker-2"):
        assert metrics[f'process_resident_memory_bytes{{process="{process}"}}'] > 10**7
    assert server.stop() == 0


def test_a_killed_worker_is_replaced_and_clients_that_retry_see_no_error(start_server, linear):
    server = start_server("--model", linear, "--workers", "2", "--metrics-port", "0").ready()
    before = pids(server)
    images = pictures(60)
    stop = threading.Event()
    problems: list[object] = []
    answered = [0] * 6

    def ask(place: int) -> None:
        try:
            with Client(server.target, Options(timeout=60)) as client:
                while not stop.is_set():
                    probabilities = client.probabilities(images)
                    if np.abs(probabilities - expected(0, images)).max() > 1e-5:
                        problems.append("a wrong answer")
                    answered[place] += 1
        except (ClassificationError, ValueError) as error:
            problems.append(error)

    threads = [threading.Thread(target=ask, args=(place,)) for place in range(6)]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    os.kill(before["1"], signal.SIGKILL)
    server.wait_for("worker 1 ended: signal SIGKILL")
    server.wait_for('"serving .*"worker": 1', count=2)
    os.kill(before["2"], signal.SIGKILL)
    server.wait_for('"serving .*"worker": 2', count=2)
    seen = list(answered)
    time.sleep(1)
    stop.set()
    for thread in threads:
        thread.join()
    assert problems == []
    assert all(after > earlier for earlier, after in zip(seen, answered, strict=True))
    after = pids(server)
    assert set(after) == {"1", "2"}
    assert not set(after.values()) & set(before.values())
    assert server.metrics()["cifar_service_worker_restarts_total"] == 2
    assert server.stop() == 0


def test_signals_are_passed_on_to_the_workers(start_server, tmp_path):
    folder = exports.write_export(tmp_path / "exported", exports.graph(0), "first")
    server = start_server("--model", folder, "--workers", "2").ready()
    exports.write_export(folder, exports.graph(1), "second")
    server.process.send_signal(signal.SIGHUP)
    server.wait_for("model second .* replaces", count=2)
    workers = pids(server)
    assert server.stop(signal.SIGINT) == 0
    assert server.log.count('"stopped"') == 2
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers.values())


def test_two_servers_do_not_share_a_port_even_while_their_workers_load(start_server, linear):
    first = start_server("--model", linear, "--workers", "2")
    port = first.wait_for("starting 2 workers")["port"]
    second = start_server("--model", linear, "--workers", "2", "--port", str(port))
    assert second.wait() == 2
    assert second.lines == [f"error: port {port} of 127.0.0.1 is already in use\n"]
    assert first.ready().stop() == 0


def test_workers_end_with_a_supervisor_that_is_killed(start_server, linear):
    server = start_server("--model", linear, "--workers", "2").ready()
    workers = pids(server)
    assert len(workers) == 2
    server.process.kill()
    server.process.wait(30)
    end = time.monotonic() + 30
    while any(running(pid) for pid in workers.values()):
        assert time.monotonic() < end, "workers outlive their supervisor"
        time.sleep(0.05)


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_reload_signal_does_not_harm_a_worker_that_is_still_starting(start_server, linear):
    server = start_server("--model", linear, "--workers", "2")
    server.wait_for("starting 2 workers")
    for _ in range(40):
        server.process.send_signal(signal.SIGHUP)
        time.sleep(0.02)
    server.ready()
    assert server.stop() == 0
    assert "ended" not in server.log


def test_a_worker_that_can_no_longer_start_is_started_again_after_growing_pauses(start_server, tmp_path):
    folder = exports.write_export(tmp_path / "exported", exports.graph(0), "first")
    server = start_server("--model", folder, "--workers", "2").ready()
    (folder / "manifest.json").rename(folder / "away")
    os.kill(pids(server)["1"], signal.SIGKILL)
    server.wait_for("worker 1 ended: .*does not exist.*another starts in 0.4 s")
    with Client(server.target) as client:  # the other one serves on
        assert client.classify(pictures(1))[0].model_version == "first"
    (folder / "away").rename(folder / "manifest.json")
    server.wait_for('"serving .*"worker": 1', count=2)
    assert server.stop() == 0
