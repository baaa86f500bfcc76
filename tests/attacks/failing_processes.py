"""Rows about processes that fail: workers that stop or die, a supervisor that cannot start any, a stuck engine."""

import re
import resource
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc

from service.client import ClassificationError, Client, Options
from service.generated.cifar.v1 import image_classifier_pb2 as messages
from service.launch import ServerProcess
from tests.attacks.http2 import CLASSIFY
from tests.attacks.measured import Measured
from tests.attacks.server import AttackedServer
from tests.service import exports

WORKERS = 2
REPLACE_SECONDS = 5.0
PATIENCE_SECONDS = 20.0
GRACE_SECONDS = 2.0
STUCK_SECONDS = 45.0  # the default of --max-batch-seconds is 30
# Standard input, output and error. Files that are open stay open, but none can be opened.
NO_MORE_FILES = 3
# A batch that begins with this byte never ends.
STUCK = bytes([exports.STALLING]) + bytes(3071)


def workers(server: ServerProcess) -> list[psutil.Process]:
    """The workers of a supervisor that are alive."""
    found = []
    with suppress(psutil.NoSuchProcess):
        for child in psutil.Process(server.process.pid).children():
            with suppress(psutil.Error):
                is_worker = any(part.startswith("service.worker") for part in child.cmdline())
                if is_worker and child.status() != psutil.STATUS_ZOMBIE:
                    found.append(child)
    return found


def serving_starts(server: ServerProcess) -> int:
    """How often a worker has begun to serve, from the log."""
    return len(re.findall(r'"serving .*"worker"', server.log))


def seconds_until(condition: Callable[[], bool], patience: float = PATIENCE_SECONDS) -> float:
    """Seconds until a condition holds; infinite if it does not within `patience`."""
    began = time.monotonic()
    while not condition():
        if time.monotonic() > began + patience:
            return float("inf")
        time.sleep(0.02)
    return time.monotonic() - began


class RetryingClients:
    """Clients that retry and open a connection for each call, while something fails; `lost` counts failed calls."""

    def __init__(self, server: AttackedServer, count: int = 8) -> None:
        self.calls = self.lost = 0
        self._target = server.target
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def _ask(self) -> None:
        images = np.zeros((3, 32, 32, 3), np.uint8)
        while not self._stop.is_set():
            try:
                with Client(self._target, Options(timeout=PATIENCE_SECONDS, attempts=1000)) as client:
                    client.probabilities(images)
                self.calls += 1
            except ClassificationError:
                self.lost += 1

    def stop(self) -> None:
        """Waits for the calls in flight."""
        self._stop.set()
        for thread in self._threads:
            thread.join(2 * PATIENCE_SECONDS)
            self.lost += thread.is_alive()


def _replacement(server: AttackedServer, fail: Callable[[psutil.Process], object]) -> list[Measured]:
    """Makes a worker fail while clients that retry call."""
    clients = RetryingClients(server)
    time.sleep(1.0)
    failing, starts = workers(server)[0], serving_starts(server)
    fail(failing)
    seconds = seconds_until(lambda: failing not in workers(server) and serving_starts(server) > starts)
    time.sleep(2.0)
    clients.stop()
    return [
        Measured("time until a worker is replaced", seconds, REPLACE_SECONDS, "s"),
        Measured("lost calls of clients that retry", clients.lost, 0),
        Measured("supervisor ended", float(server.process.poll() is not None), 0),
    ]


def stopped_worker(server: AttackedServer) -> list[Measured]:
    """kill -STOP of one of two workers."""
    return _replacement(server, lambda worker: worker.suspend())


def real_time_signal(server: AttackedServer) -> list[Measured]:
    """kill -40 of one of two workers: a signal for which Python has no name."""
    return _replacement(server, lambda worker: worker.send_signal(40))


def failed_start(server: AttackedServer) -> list[Measured]:
    """The supervisor has no file descriptors left for three seconds, while a worker is killed."""

    def fail(worker: psutil.Process) -> None:
        supervisor = psutil.Process(server.pid)
        usual = supervisor.rlimit(resource.RLIMIT_NOFILE)
        supervisor.rlimit(resource.RLIMIT_NOFILE, (NO_MORE_FILES, usual[1]))
        worker.kill()
        time.sleep(3)
        with suppress(psutil.NoSuchProcess):
            supervisor.rlimit(resource.RLIMIT_NOFILE, usual)

    return _replacement(server, fail)


def stuck_options() -> tuple[str, ...]:
    """Options of a server whose engine never returns from some batches."""
    folder = Path(tempfile.mkdtemp())
    exports.write_export(folder, exports.graph(0, loops=10**9))
    return ("--model", str(folder), "--grace", str(GRACE_SECONDS))


@contextmanager
def stuck(server: AttackedServer) -> Iterator[None]:
    """A call that keeps the engine busy until the end of a `with`."""
    request = messages.ClassifyRequest(packed_rgb=STUCK).SerializeToString()
    with server.victim.channel() as channel:
        call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(CLASSIFY)
        answer = call.future(request, timeout=120)  # a call that nobody refers to is cancelled
        time.sleep(0.5)
        yield
        answer.cancel()


def stuck_engine(server: AttackedServer) -> list[Measured]:
    """A batch that never ends: health says NOT_SERVING, or the process ends so that it is replaced."""
    with stuck(server):
        noticed = seconds_until(lambda: not serves(server), 60)
    return [Measured("time until health is not SERVING", noticed, STUCK_SECONDS, "s")]


def sigterm_while_stuck(server: AttackedServer) -> list[Measured]:
    """SIGTERM during a batch that never ends."""
    with stuck(server):
        server.process.terminate()
        ended = seconds_until(lambda: server.process.poll() is not None, GRACE_SECONDS + PATIENCE_SECONDS)
    return [Measured("time from SIGTERM to the end", ended, GRACE_SECONDS + 3.0, "s")]


def serves(server: AttackedServer) -> bool:
    """Whether health says SERVING."""
    with server.victim.channel() as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        try:
            answer = health.Check(health_pb2.HealthCheckRequest(), timeout=5)
        except grpc.RpcError:
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
