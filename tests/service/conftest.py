"""Fixtures that start real servers as child processes, on free ports of the loopback interface."""

import contextlib
import os
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from service.generated.cifar.v1 import image_classifier_pb2 as messages
from service.generated.cifar.v1 import image_classifier_pb2_grpc as rpc
from service.launch import ServerProcess
from tests.conftest import REPOSITORY
from tests.service import exports

# The loopback interface has no proxy in front of it, whatever the environment of the tests says.
os.environ["no_grpc_proxy"] = "127.0.0.1,localhost"  # noqa: SIM112 -- gRPC reads the variable in lower case only
DIRECTLY = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Server(ServerProcess):
    """A server of this checkout."""

    def __init__(self, *arguments: str | Path, environment: dict[str, str] | None = None) -> None:
        super().__init__(*arguments, environment=environment, folder=REPOSITORY)


StartServer = Callable[..., Server]


@contextlib.contextmanager
def serving(*arguments: str | Path, **options: dict[str, str]) -> Iterator[Server]:
    """A server for the `with` block, which must leave it in order: it ends with exit code 0."""
    server = Server(*arguments, **options).ready()
    try:
        yield server
        assert server.stop() == 0, server.log
    finally:
        server.kill()


@pytest.fixture
def start_server() -> Iterator[StartServer]:
    """A function that starts servers; they end with the test."""
    with contextlib.ExitStack() as stack:

        def start(*arguments: str | Path, **options: dict[str, str]) -> Server:
            server = Server(*arguments, **options)
            stack.callback(server.kill)
            return server

        yield start


@pytest.fixture(scope="session")
def linear(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of a small linear model that fails on a batch whose first byte is 255."""
    return exports.write_export(tmp_path_factory.mktemp("linear"), exports.graph(0, fails_on=exports.STALLING))


@pytest.fixture(scope="session")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of a linear model that takes about a second for a batch whose first byte is 255."""
    return exports.write_export(tmp_path_factory.mktemp("slow"), exports.graph(0, loops=150))


@pytest.fixture(scope="session")
def server(linear: Path) -> Iterator[Server]:
    """One server for all tests that leave it unchanged."""
    with serving("--model", linear, "--metrics-port", "0", "--log-level", "debug", "--max-images", "400") as shared:
        yield shared


@pytest.fixture
def stub(server: Server) -> Iterator[rpc.ImageClassifierStub]:
    """A stub that is connected to the shared server."""
    with grpc.insecure_channel(server.target) as channel:
        yield rpc.ImageClassifierStub(channel)


def table(response: messages.ClassifyResponse) -> list[list[float]]:
    """Probabilities in the model's order of classes, one row per image."""
    rows = []
    for result in response.results:
        row = [0.0] * len(result.classes)
        for ranked in result.classes:
            row[ranked.index] = ranked.probability
        rows.append(row)
    return rows


def until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    """Waits until the condition holds; fails when it still does not after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"the condition did not hold within {seconds} s"
        time.sleep(0.01)
