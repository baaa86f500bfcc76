"""Measures how fast the server starts, refuses and meets deadlines, and its memory around a flood; prints one table.

    python benchmarks/dependability.py [--flood-seconds 60] [--checkout FOLDER]

Nothing else should run on the machine, because it measures milliseconds.
"""

import argparse
import itertools
import os
import statistics
import struct
import tempfile
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from processes import memory
from servers import REPOSITORY
from slow_model import write_slow_export
from tabulate import tabulate

from service.generated.cifar.v1 import image_classifier_pb2 as cifar
from service.generated.cifar.v1 import image_classifier_pb2_grpc as cifar_rpc
from service.generated.inference import open_inference_pb2 as inference
from service.generated.inference import open_inference_pb2_grpc as inference_rpc
from service.launch import ServerProcess

IMAGE_BYTES = 3072
# gRPC reads this name in small letters only. The loopback interface is behind no proxy.
os.environ["no_grpc_proxy"] = "127.0.0.1,localhost"  # noqa: SIM112


class Server(ServerProcess):
    """A server that answers, and the seconds from its start to health SERVING.

    Args:
        checkout: Folder that it runs in.
        arguments: Further options.
        bytecode: Folder for compiled modules. None: modules are compiled at each start where Python may not write.
    """

    def __init__(self, checkout: Path, *arguments: str, bytecode: str | None = None) -> None:
        began = time.perf_counter()
        variables = {"PYTHONPYCACHEPREFIX": bytecode, "PYTHONDONTWRITEBYTECODE": ""} if bytecode else None
        super().__init__("--metrics-port", "0", *arguments, folder=checkout, environment=variables)
        while not self._serves():
            time.sleep(0.002)
        self.start_seconds = time.perf_counter() - began

    def _serves(self) -> bool:
        with grpc.insecure_channel(self.target, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            health: Any = health_pb2_grpc.HealthStub(channel)
            try:
                answer = health.Check(health_pb2.HealthCheckRequest(), timeout=1)
            except grpc.RpcError:
                return False
            return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    def metric(self, name: str) -> float:
        """The value of a metric without labels."""
        return self.metrics()[f"cifar_service_{name}"]

    @property
    def memory(self) -> float:
        """Memory of all its processes in MiB."""
        return memory(self.process.pid)


class Report:
    """The rows of the table, printed as they come to show progress, and once more as Markdown."""

    def __init__(self) -> None:
        self._rows: list[tuple[str, str, str, str]] = []

    def times(self, name: str, milliseconds: list[float]) -> None:
        """Adds the median and the maximum of several measurements."""
        median, slowest = statistics.median(milliseconds), max(milliseconds)
        self._add(name, f"{median:.1f} ms", f"{slowest:.1f} ms", str(len(milliseconds)))

    def value(self, name: str, value: str) -> None:
        """Adds a single figure."""
        self._add(name, value, "", "")

    def _add(self, *row: str) -> None:
        name, value, slowest, count = row
        self._rows.append((name, value, slowest, count))
        print("  ".join(row), flush=True)

    def print(self) -> None:
        """Prints the table."""
        print()
        print(tabulate(self._rows, ("", "median", "maximum", "n"), "github", disable_numparse=True))


def milliseconds(call: Callable[[], object], code: grpc.StatusCode) -> float:
    """How long a call takes that must end with this status."""
    began = time.perf_counter()
    try:
        call()
    except grpc.RpcError as error:
        if error.code() is code:
            return (time.perf_counter() - began) * 1000
        raise
    raise SystemExit(f"a call was answered that should have ended with {code.name}")


def start(report: Report, checkout: Path, times: int) -> None:
    """From the start of the process to health SERVING, with the shipped model; memory before the first request.

    An installed wheel holds compiled modules. So that a checkout is measured like that, they are compiled before.
    """
    seconds, held = [], []
    with tempfile.TemporaryDirectory() as bytecode:
        with Server(checkout, bytecode=bytecode):
            pass
        for _ in range(times):
            with Server(checkout, bytecode=bytecode) as server:
                seconds.append(server.start_seconds)
                held.append(server.memory)
    report.times("start of the process to health SERVING", [value * 1000 for value in seconds])
    report.value("memory before the first request", f"{statistics.median(held):.0f} MiB")


def busy_engine(report: Report, checkout: Path, folder: Path) -> None:
    """Deadlines, cancellation and refusals while a batch takes about a second."""
    write_slow_export(folder, checkout / "exported")
    # One thread and batches of one image, so that one request of 50 images keeps the engine busy.
    options = ["--threads", "1", "--max-batch-size", "1", "--max-queued-images", "60", "--max-images", "60"]
    with (
        Server(checkout, "--model", str(folder), *options) as server,
        grpc.insecure_channel(server.target) as channel,
    ):
        stub: Any = cifar_rpc.ImageClassifierStub(channel)  # type: ignore[no-untyped-call]
        one = cifar.ClassifyRequest(packed_rgb=bytes(IMAGE_BYTES))
        occupying = stub.Classify.future(cifar.ClassifyRequest(packed_rgb=bytes(50 * IMAGE_BYTES)))
        while server.metric("admitted_images") < 50:
            time.sleep(0.01)
        deadlines(report, channel)
        for _ in range(50):
            cancelled = stub.Classify.future(one)
            time.sleep(0.02)
            cancelled.cancel()
        time.sleep(0.5)
        skipped = server.metric("spared_images_total")
        report.value("expired and cancelled images that the engine did not compute", f"{skipped:.0f} of 150")

        filling = stub.Classify.future(cifar.ClassifyRequest(packed_rgb=bytes(10 * IMAGE_BYTES)))
        while server.metric("admitted_images") < 60:
            time.sleep(0.01)
        full = grpc.StatusCode.RESOURCE_EXHAUSTED
        refused = [milliseconds(lambda: stub.Classify(one), full) for _ in range(500)]
        report.times("RESOURCE_EXHAUSTED from a full queue, one caller", refused)
        occupying.cancel()
        filling.cancel()
        while server.metric("admitted_images"):
            time.sleep(0.01)
        computed = server.metric("engine_images_total")
        report.value("images computed for the 710 requested in calls that were cancelled or refused", f"{computed:.0f}")


def deadlines(report: Report, channel: grpc.Channel) -> None:
    """Answers to requests whose deadline of 100 ms passes while the engine is busy."""
    stub: Any = cifar_rpc.ImageClassifierStub(channel)  # type: ignore[no-untyped-call]
    open_stub: Any = inference_rpc.GRPCInferenceServiceStub(channel)  # type: ignore[no-untyped-call]
    code = grpc.StatusCode.DEADLINE_EXCEEDED
    one = cifar.ClassifyRequest(packed_rgb=bytes(IMAGE_BYTES))
    late = [milliseconds(lambda: stub.Classify(one, timeout=0.1), code) - 100 for _ in range(50)]
    report.times("answer after a gRPC deadline of 100 ms, engine busy", late)

    tensor = inference.ModelInferRequest.InferInputTensor(name="images", datatype="UINT8", shape=[1, 32, 32, 3])
    request = inference.ModelInferRequest(
        model_name="cifar10", inputs=[tensor], raw_input_contents=[bytes(IMAGE_BYTES)]
    )
    request.parameters["timeout"].int64_param = 100_000  # microseconds
    late = [milliseconds(lambda: open_stub.ModelInfer(request), code) - 100 for _ in range(50)]
    report.times("answer after the parameter timeout of 100 ms, engine busy", late)


def decompression_bomb(report: Report, checkout: Path) -> None:
    """A PNG of few bytes whose header says 30,000 x 30,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    file = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(9000))) + chunk(b"IEND", b"")
    )
    with Server(checkout) as server, grpc.insecure_channel(server.target) as channel:
        stub: Any = cifar_rpc.ImageClassifierStub(channel)  # type: ignore[no-untyped-call]
        times = []
        for _ in range(100):
            began = time.perf_counter()
            answer = stub.Classify(cifar.ClassifyRequest(images=[cifar.Image(encoded=file)]))
            times.append((time.perf_counter() - began) * 1000)
            if answer.results[0].error.code != grpc.StatusCode.INVALID_ARGUMENT.value[0]:
                raise SystemExit("a PNG of 30,000 x 30,000 pixels was not refused")
        report.times(f"answer to a PNG of {len(file)} bytes and 30,000 x 30,000 pixels", times)


class Flood:
    """Connections that ask for more images than the queue holds.

    Attributes:
        outcomes: Number of calls by status.
        refusals: Milliseconds of each call that was not answered.
    """

    def __init__(self, target: str, clients: int) -> None:
        self.outcomes: Counter[str] = Counter()
        self.refusals: list[float] = []
        self._target, self._clients = target, clients
        self._stop = threading.Event()

    def run(self, seconds: float) -> None:
        """Asks for a time, and counts from zero."""
        self.outcomes.clear()
        self.refusals.clear()
        self._stop.clear()
        with ThreadPoolExecutor(self._clients) as pool:
            futures = [pool.submit(self._ask, seed) for seed in range(self._clients)]
            time.sleep(seconds)
            self._stop.set()
            for future in futures:
                future.result()

    def _ask(self, seed: int) -> None:
        sizes = itertools.cycle([300, 1, 40, 300, 128])
        with grpc.insecure_channel(self._target, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            stub: Any = cifar_rpc.ImageClassifierStub(channel)  # type: ignore[no-untyped-call]
            for size in itertools.islice(sizes, seed % 5, None):
                if self._stop.is_set():
                    return
                began = time.perf_counter()
                try:
                    stub.Classify(cifar.ClassifyRequest(packed_rgb=bytes(size * IMAGE_BYTES)))
                    self.outcomes["OK"] += 1
                except grpc.RpcError as error:
                    self.outcomes[error.code().name] += 1
                    self.refusals.append((time.perf_counter() - began) * 1000)


def flood(report: Report, checkout: Path, seconds: float, clients: int) -> None:
    """Memory and refusals while more images arrive than the queue holds, with the shipped model."""
    with Server(checkout) as server:
        attack = Flood(server.target, clients)
        attack.run(3)  # allocates what is allocated once
        time.sleep(2)
        before = server.memory
        peak = [before]
        stop = threading.Event()

        def sample() -> None:
            while not stop.wait(0.2):
                peak.append(server.memory)

        sampler = threading.Thread(target=sample)
        sampler.start()
        attack.run(seconds)
        stop.set()
        sampler.join()
        time.sleep(2)
        report.value(
            f"memory around a flood of {seconds:.0f} s from {clients} connections",
            f"before {before:.0f}, peak {max(peak):.0f}, after {server.memory:.0f} MiB",
        )
        report.value("calls during the flood", str(dict(attack.outcomes)))
        if attack.refusals:
            report.times("RESOURCE_EXHAUSTED during it; client and server share the cores", attack.refusals)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Start, deadlines, refusals and memory of the server.")
    parser.add_argument("--starts", type=int, default=10, help="number of starts; default: %(default)s")
    parser.add_argument("--flood-seconds", type=float, default=60, help="length of the flood; default: %(default)s")
    parser.add_argument("--flood-clients", type=int, default=40, help="number of connections; default: %(default)s")
    parser.add_argument("--checkout", type=Path, default=REPOSITORY, help="folder whose server is measured")
    arguments = parser.parse_args()
    report, checkout = Report(), arguments.checkout.resolve()
    start(report, checkout, arguments.starts)
    with tempfile.TemporaryDirectory() as folder:
        busy_engine(report, checkout, Path(folder))
    decompression_bomb(report, checkout)
    flood(report, checkout, arguments.flood_seconds, arguments.flood_clients)
    report.print()


if __name__ == "__main__":
    main()
