"""What a server uses, and what its honest clients see, while it is attacked.

Honest clients run in a process of their own (`python -m tests.attacks.observers`), so that the attacker's Python
threads do not delay them; they stop when their standard input is closed, and print what they saw as JSON.
"""

import argparse
import json
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import grpc

from benchmarks.processes import cpu_seconds, memory
from service.generated.cifar.v1 import image_classifier_pb2 as messages
from service.generated.cifar.v1 import image_classifier_pb2_grpc as rpc
from tests.attacks.http2 import Target
from tests.attacks.image_bombs import honest_png

REPOSITORY = Path(__file__).parents[2]
SAMPLE_SECONDS = 0.2
PROBE_SECONDS = 0.01
CALL_SECONDS = 20.0
FAILURE_PAUSE = 0.05


def wait_until_idle(pid: int, seconds: float, share: float = 0.1) -> None:
    """Waits until a process tree uses less than a share of one core, at most so many seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        before = cpu_seconds(pid)
        time.sleep(0.5)
        if cpu_seconds(pid) - before < share * 0.5:
            return


class MemoryWatch:
    """Samples the memory of a process tree for the length of a `with`.

    Attributes:
        before: MiB at the beginning.
        peak: The most seen since, in MiB.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self.before = self.peak = 0.0

    def __enter__(self) -> Self:
        self.before = self.peak = memory(self._pid)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            self.peak = max(self.peak, memory(self._pid))

    def after(self, within: float = 64.0, seconds: float = 30.0) -> float:
        """MiB once the memory is back to within so many MiB of before, or after so many seconds."""
        end = time.monotonic() + seconds
        while (now := memory(self._pid)) > self.before + within and time.monotonic() < end:
            time.sleep(0.5)
        return now


@dataclass
class Seen:
    """What honest clients saw.

    Attributes:
        seconds: For how long they asked.
        latencies: Seconds of each call that was answered.
        failures: Number of calls that failed, by status.
        slowest: Seconds of the slowest call, whether it was answered or failed.
        longest_probe: Seconds of the slowest call of GetModel, of which one is made every 10 ms; 0 without probe.
    """

    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    failures: dict[str, int] = field(default_factory=dict)
    slowest: float = 0.0
    longest_probe: float = 0.0

    @property
    def rate(self) -> float:
        """Answers per second."""
        return len(self.latencies) / self.seconds if self.seconds else 0.0


class HonestClients:
    """Clients that classify one image at a time, and perhaps a probe of the event loop, for the length of a `with`.

    Args:
        target: The server, without TLS.
        clients: Number of clients, each with a connection of its own.
        image: "png" or "pixels".
        pause: Seconds between two calls of a client.
        probe: Whether to call GetModel every 10 ms.
    """

    def __init__(
        self, target: Target, clients: int = 4, image: str = "png", pause: float = 0.05, probe: bool = False
    ) -> None:
        self.seen = Seen()
        command = [sys.executable, "-m", "tests.attacks.observers", "--port", str(target.port)]
        command += ["--clients", str(clients), "--image", image, "--pause", str(pause)]
        self._command = [*command, "--probe"] if probe else command

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            self._command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        if self._process.stdout.readline() != "ready\n":
            raise RuntimeError("the honest clients did not start")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        output, _ = self._process.communicate(timeout=3 * CALL_SECONDS)
        self.seen = Seen(**json.loads(output))


class Observer:
    """Asks a server until it is stopped; see `HonestClients` for the arguments."""

    def __init__(self, target: Target, clients: int, image: str, pause: float, probe: bool) -> None:
        self._target, self._image, self._pause = target, image, pause
        self._stop = threading.Event()
        self._ready = threading.Barrier(clients + probe + 1)
        self._lock = threading.Lock()
        self._seen = Seen()
        self._threads = [threading.Thread(target=self._classify) for _ in range(clients)]
        if probe:
            self._threads.append(threading.Thread(target=self._probe))

    def observe(self) -> Seen:
        """Asks until standard input is closed."""
        for thread in self._threads:
            thread.start()
        self._ready.wait()
        began = time.perf_counter()
        print("ready", flush=True)
        sys.stdin.read()
        self._stop.set()
        self._seen.seconds = time.perf_counter() - began
        for thread in self._threads:
            thread.join()
        return self._seen

    def _classify(self) -> None:
        request = messages.ClassifyRequest(packed_rgb=bytes(3072))
        if self._image == "png":
            request = messages.ClassifyRequest(images=[messages.Image(encoded=honest_png())])
        with self._target.channel() as channel:
            stub = rpc.ImageClassifierStub(channel)  # type: ignore[no-untyped-call]
            stub.Classify(request, timeout=CALL_SECONDS)  # connects
            self._ready.wait()
            while not self._stop.wait(self._pause):
                began = time.perf_counter()
                failure = ""
                try:
                    answer = stub.Classify(request, timeout=CALL_SECONDS)
                    if any(result.HasField("error") for result in answer.results):
                        failure = answer.results[0].error.message
                except grpc.RpcError as error:
                    failure = error.code().name
                self._note(time.perf_counter() - began, failure)
                if failure:
                    time.sleep(FAILURE_PAUSE)

    def _note(self, seconds: float, failure: str) -> None:
        with self._lock:
            self._seen.slowest = max(self._seen.slowest, seconds)
            if failure:
                self._seen.failures[failure] = self._seen.failures.get(failure, 0) + 1
            else:
                self._seen.latencies.append(seconds)

    def _probe(self) -> None:
        with self._target.channel() as channel:
            stub = rpc.ImageClassifierStub(channel)  # type: ignore[no-untyped-call]
            stub.GetModel(messages.GetModelRequest(), timeout=CALL_SECONDS)
            self._ready.wait()
            while not self._stop.wait(PROBE_SECONDS):
                began = time.perf_counter()
                with suppress(grpc.RpcError):
                    stub.GetModel(messages.GetModelRequest(), timeout=CALL_SECONDS)
                self._seen.longest_probe = max(self._seen.longest_probe, time.perf_counter() - began)


def main() -> None:
    """The command line of the process of honest clients."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--clients", type=int, required=True)
    parser.add_argument("--image", choices=("png", "pixels"), required=True)
    parser.add_argument("--pause", type=float, required=True)
    parser.add_argument("--probe", action="store_true")
    arguments = parser.parse_args()
    observer = Observer(Target(arguments.port), arguments.clients, arguments.image, arguments.pause, arguments.probe)
    print(json.dumps(asdict(observer.observe())))


if __name__ == "__main__":
    main()
