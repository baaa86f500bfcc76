"""Many clients at once while the server is stopped, changes its model or loses a worker. Every answer is checked."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest

from service.client import Client, Options
from service.generated.cifar.v1 import image_classifier_pb2 as messages
from service.generated.cifar.v1 import image_classifier_pb2_grpc as rpc
from tests.service import exports
from tests.service.exports import expected, pictures
from tests.service.workers.test_supervisor import pids

POOL = pictures(4096, seed=99)
# The answers of two models for the pool, computed in NumPy. Any two images of the pool have clearly different answers.
ANSWERS = {version: expected(seed, POOL) for version, seed in (("first", 0), ("second", 1))}
TOLERANCE = 1e-5
SIZES = (1, 1, 1, 1, 2, 3, 7, 31, 32, 33, 64, 100, 300)


class Load:
    """Clients that send requests until stopped. Each is a thread with its own connection and checks every answer.

    A call is "right", "wrong", "refused" (UNAVAILABLE: the server did not accept it) or failed with another status.

    Args:
        target: HOST:PORT of the server.
        clients: Number of clients.
        images: The clients stop after so many images; None: when `stop` is set.
    """

    def __init__(self, target: str, clients: int, images: int | None = None) -> None:
        self.target = target
        self.outcomes: Counter[str] = Counter()
        self.versions: Counter[str] = Counter()
        self.images = 0
        self.stop = threading.Event()
        self._images_wanted = images
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(clients)
        self._clients = [self._pool.submit(self._ask, seed) for seed in range(clients)]

    def _ask(self, seed: int) -> None:
        choice = random.Random(seed)
        with grpc.insecure_channel(self.target, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            stub = rpc.ImageClassifierStub(channel)
            while not self.stop.is_set():
                outcome, version, count = self._once(stub, choice)
                with self._lock:
                    self.outcomes[outcome] += 1
                    if version:
                        self.versions[version] += 1
                        self.images += count
                        if self._images_wanted is not None and self.images >= self._images_wanted:
                            self.stop.set()
                if outcome == "refused":
                    time.sleep(0.05)

    def _once(self, stub: rpc.ImageClassifierStub, choice: random.Random) -> tuple[str, str, int]:
        rows = [choice.randrange(len(POOL)) for _ in range(choice.choice(SIZES))]
        split = min(choice.randrange(len(rows) + 1), 20)  # the first ones are sent as images, the others packed
        name = str(choice.random())
        request = messages.ClassifyRequest(
            request_id=name,
            images=[messages.Image(rgb=POOL[row].tobytes()) for row in rows[:split]],
            packed_rgb=POOL[rows[split:]].tobytes(),
        )
        try:
            response = stub.Classify(request, timeout=120)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                return "refused", "", 0
            return f"{error.code().name}: {error.details()}", "", 0
        table = np.zeros((len(rows), 10))
        for row, result in zip(table, response.results, strict=True):
            for ranked in result.classes:
                row[ranked.index] = ranked.probability
        difference = np.abs(table - ANSWERS[response.model_version][rows]).max()
        right = difference < TOLERANCE and response.request_id == name
        return "right" if right else "wrong", response.model_version, len(rows)

    def end(self, seconds: float = 280) -> None:
        for client in self._clients:
            client.result(timeout=seconds)
        self._pool.shutdown()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return exports.write_export(tmp_path / "exported", exports.graph(0), "first")


def all_answered(start_server, folder, clients: int, images: int) -> Load:
    server = start_server("--model", folder, "--max-queued-images", "100000").ready()
    load = Load(server.target, clients, images)
    load.end()
    assert server.stop() == 0
    assert set(load.outcomes) == {"right"}
    assert load.images >= images
    return load


def test_no_answer_is_lost_or_mixed_up(start_server, folder):
    all_answered(start_server, folder, clients=20, images=10_000)


@pytest.mark.slow
def test_100_000_images_from_200_clients_are_all_answered_and_none_is_mixed_up(start_server, folder):
    load = all_answered(start_server, folder, clients=200, images=100_000)
    print(f"{sum(load.outcomes.values())} requests, {load.images} images: {dict(load.outcomes)}")


def stopped_under_load(start_server, folder, clients: int, seconds: float) -> Load:
    server = start_server("--model", folder, "--max-queued-images", "100000").ready()
    load = Load(server.target, clients)
    time.sleep(seconds)
    assert server.stop(seconds=120) == 0
    time.sleep(0.2)
    load.stop.set()
    load.end()
    stopped = server.wait_for('"stopped"')
    # An accepted call is answered, and a call that is not accepted ends in UNAVAILABLE, never in CANCELLED.
    assert set(load.outcomes) == {"right", "refused"}
    assert stopped["unanswered"] == 0
    assert stopped["answered"] == load.outcomes["right"]
    return load


@contextmanager
def busy_cores(count: int) -> Iterator[None]:
    """Processes that compete with the server for CPU time until the end of a `with` block."""
    with ExitStack() as stack:
        for _ in range(count):
            process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
            stack.callback(process.wait)
            stack.callback(process.kill)
        yield


def test_sigterm_under_load_fails_no_accepted_call(start_server, folder):
    stopped_under_load(start_server, folder, clients=20, seconds=1.0)


@pytest.mark.slow
def test_sigterm_under_load_of_200_clients_fails_no_accepted_call(start_server, folder):
    load = stopped_under_load(start_server, folder, clients=200, seconds=10.0)
    print(dict(load.outcomes))


@pytest.mark.slow
@pytest.mark.parametrize("attempt", range(10))
def test_sigterm_under_load_while_other_work_keeps_both_cores_busy_fails_no_accepted_call(
    start_server, folder, attempt
):
    with busy_cores(2):
        load = stopped_under_load(start_server, folder, clients=200, seconds=5.0)
    print(attempt, dict(load.outcomes))


def model_changed_under_load(start_server, folder, clients: int, changes: int) -> Load:
    server = start_server("--model", folder, "--max-queued-images", "100000").ready()
    load = Load(server.target, clients)
    for change in range(changes):
        version = ("second", "first")[change % 2]
        exports.write_export(folder, exports.graph(1 - change % 2), version)
        server.wait_for(f"model {version} .* replaces", count=change // 2 + 1)
        time.sleep(0.3)
    load.stop.set()
    load.end()
    assert server.stop() == 0
    assert set(load.outcomes) == {"right"}
    assert set(load.versions) == {"first", "second"}
    return load


def test_a_new_model_under_load_loses_no_request(start_server, folder):
    model_changed_under_load(start_server, folder, clients=20, changes=1)


@pytest.mark.slow
def test_ten_new_models_under_load_of_200_clients_lose_no_request(start_server, folder):
    load = model_changed_under_load(start_server, folder, clients=200, changes=10)
    print(dict(load.outcomes), dict(load.versions))


@pytest.mark.slow
def test_clients_that_retry_see_no_error_while_workers_are_killed_again_and_again(start_server, folder):
    server = start_server("--model", folder, "--workers", "2", "--max-queued-images", "100000").ready()
    stop = threading.Event()
    calls: Counter[int] = Counter()

    def ask(seed: int) -> None:
        generator = np.random.default_rng(seed)
        with Client(server.target, Options(timeout=120)) as client:
            while not stop.is_set():
                rows = generator.integers(0, len(POOL), int(generator.integers(1, 300)))
                assert np.abs(client.probabilities(POOL[rows]) - ANSWERS["first"][rows]).max() < TOLERANCE
                calls[seed] += 1

    with ThreadPoolExecutor(50) as pool:
        clients = [pool.submit(ask, seed) for seed in range(50)]
        for turn in range(6):
            number = str(turn % 2 + 1)
            time.sleep(1.5)
            os.kill(pids(server)[number], signal.SIGKILL)
            server.wait_for(f'"serving .*"worker": {number}', count=turn // 2 + 2)
        stop.set()
        for client in clients:
            client.result(timeout=120)
    assert server.stop() == 0
    assert len(calls) == 50
    print(f"{sum(calls.values())} calls, 6 workers killed, no error")
