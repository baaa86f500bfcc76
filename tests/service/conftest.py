"""A real server in a process of its own, on a free port of the loopback."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from service.generated.cifar.v1 import image_classifier_pb2 as messages
from service.generated.cifar.v1 import image_classifier_pb2_grpc as rpc
from tests.conftest import REPOSITORY
from tests.service import exports

START_SECONDS = 60.0
# Whatever proxy the machine is set to use: the loopback is not behind it.
os.environ["no_grpc_proxy"] = "127.0.0.1,localhost"  # noqa: SIM112 -- gRPC knows the small letters only
DIRECTLY = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Server:
    """A started server. Its log is read as it comes."""

    def __init__(self, *arguments: str | Path, environment: dict[str, str] | None = None) -> None:
        self.lines: list[str] = []
        self._arrived = threading.Condition()
        clean = {key: value for key, value in os.environ.items() if not key.startswith("CIFAR_SERVICE_")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "service", "--log-format", "json", "--port", "0", *map(str, arguments)],
            cwd=REPOSITORY,
            env={**clean, **(environment or {})},
            stderr=subprocess.PIPE,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stderr or ():
            with self._arrived:
                self.lines.append(line)
                self._arrived.notify_all()
        with self._arrived:
            self._arrived.notify_all()

    def wait_for(self, pattern: str, count: int = 1, seconds: float = START_SECONDS) -> dict[str, object]:
        """The `count`th line of the log in which the pattern is found."""
        end = time.monotonic() + seconds
        with self._arrived:
            while True:
                found = [line for line in self.lines if re.search(pattern, line)]
                if len(found) >= count:
                    return json.loads(found[count - 1])
                if self.process.poll() is not None and not self._reader.is_alive():
                    raise AssertionError(f"the server ended without /{pattern}/:\n" + "".join(self.lines))
                if time.monotonic() > end:
                    raise AssertionError(f"no /{pattern}/ within {seconds} s:\n" + "".join(self.lines))
                self._arrived.wait(0.2)

    @property
    def port(self) -> int:
        return int(str(self.wait_for('"port"')["port"]))

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    def ready(self) -> "Server":
        """Waits until it serves."""
        self.wait_for(r'"all \d+ workers serve"|"serving (?!.*"worker")')
        return self

    def metrics(self) -> dict[str, float]:
        """What Prometheus would see, by name with labels."""
        address = str(self.wait_for("metrics at")["message"]).removeprefix("metrics at ")
        with DIRECTLY.open(address, timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        return {
            name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        }

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Signals it and waits for its end; the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        """Waits for its end; the exit code."""
        code = self.process.wait(60)
        self._reader.join(10)
        return code

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(60)

    @property
    def log(self) -> str:
        return "".join(self.lines)


StartServer = Callable[..., Server]


@pytest.fixture
def start_server() -> Iterator[StartServer]:
    """Starts servers that end with the test."""
    with contextlib.ExitStack() as stack:

        def start(*arguments: str | Path, **options: dict[str, str]) -> Server:
            server = Server(*arguments, **options)
            stack.callback(server.kill)
            return server

        yield start


@pytest.fixture(scope="session")
def linear(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of a small linear model, which fails on batches that begin with the byte 255."""
    return exports.write_export(tmp_path_factory.mktemp("linear"), exports.graph(0, fails_on=exports.STALLING))


@pytest.fixture(scope="session")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A linear model that takes a second, more or less, for a batch that begins with the byte 255."""
    return exports.write_export(tmp_path_factory.mktemp("slow"), exports.graph(0, loops=150))


@pytest.fixture(scope="session")
def server(linear: Path) -> Iterator[Server]:
    """One server for all tests that leave it as it was."""
    shared = Server("--model", linear, "--metrics-port", "0", "--log-level", "debug", "--max-images", "400").ready()
    yield shared
    assert shared.stop() == 0, shared.log


@pytest.fixture
def stub(server: Server) -> Iterator[rpc.ImageClassifierStub]:
    with grpc.insecure_channel(server.target) as channel:
        yield rpc.ImageClassifierStub(channel)


def table(response: messages.ClassifyResponse) -> list[list[float]]:
    """Probabilities by index of class, a row per image."""
    rows = []
    for result in response.results:
        row = [0.0] * len(result.classes)
        for ranked in result.classes:
            row[ranked.index] = ranked.probability
        rows.append(row)
    return rows


def until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    """Waits for what must come."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)
