"""How fast the server starts, refuses and gives up, and what a flood does to its memory; prints one table.

    python benchmarks/dependability.py [--flood-seconds 60]

Needs nothing else to run on the machine: it measures milliseconds.
"""

import argparse
import itertools
import os
import re
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY))

from service.generated.cifar.v1 import image_classifier_pb2 as cifar  # noqa: E402
from service.generated.cifar.v1 import image_classifier_pb2_grpc as cifar_rpc  # noqa: E402
from service.generated.inference import open_inference_pb2 as inference  # noqa: E402
from service.generated.inference import open_inference_pb2_grpc as inference_rpc  # noqa: E402
from tests.service import exports  # noqa: E402

IMAGE = 3072
# Whatever proxy the machine is set to use: the loopback is not behind it.
DIRECTLY = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Server:
    """A server process on free ports, and the seconds from its start to health SERVING."""

    def __init__(self, *arguments: str) -> None:
        self.port, self.metrics_port = _free_port(), _free_port()
        began = time.perf_counter()
        self.process = subprocess.Popen(
            [
                sys.executable, "-m", "service", "--log-level", "error",
                "--port", str(self.port), "--metrics-port", str(self.metrics_port), *arguments,
            ],
            cwd=REPOSITORY,
        )  # fmt: skip
        self.target = f"127.0.0.1:{self.port}"
        while not self._serves():
            if self.process.poll() is not None:
                raise SystemExit(f"the server ended with exit code {self.process.returncode}")
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
        with DIRECTLY.open(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=10) as answer:
            found = re.search(rf"^cifar_service_{name} (\S+)$", answer.read().decode(), re.MULTILINE)
        return float(found[1]) if found else float("nan")

    @property
    def resident(self) -> float:
        """MiB."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(60)


@contextmanager
def running(*arguments: str) -> Iterator[Server]:
    """A server for the length of a `with`."""
    server = Server(*arguments)
    try:
        yield server
    finally:
        server.stop()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def milliseconds(call: Callable[[], object], code: grpc.StatusCode) -> float:
    """How long a call takes that ends with this status."""
    began = time.perf_counter()
    try:
        call()
    except grpc.RpcError as error:
        if error.code() is code:
            return (time.perf_counter() - began) * 1000
        raise
    raise SystemExit(f"a call was answered that should have ended with {code.name}")


def row(name: str, values: list[float], unit: str) -> None:
    """One line of the table."""
    print(f"{name:68s} median {statistics.median(values):8.1f}   max {max(values):8.1f} {unit}   n = {len(values)}")


def start(times: int) -> None:
    """From process start to health SERVING, on the shipped model."""
    seconds = []
    for _ in range(times):
        with running() as server:
            seconds.append(server.start_seconds)
    row("process start to health SERVING", [value * 1000 for value in seconds], "ms")


def busy_engine(folder: Path) -> None:
    """Deadlines, cancellation and refusals while a batch takes about a second."""
    # One thread, so that one batch keeps the engine busy.
    options = ["--threads", "1", "--max-batch-size", "1", "--max-queued-images", "60", "--max-images", "60"]
    with (
        running("--model", str(folder), *options) as server,
        grpc.insecure_channel(server.target) as channel,
    ):
        stub: Any = cifar_rpc.ImageClassifierStub(channel)  # type: ignore[no-untyped-call]
        open_stub: Any = inference_rpc.GRPCInferenceServiceStub(channel)  # type: ignore[no-untyped-call]
        occupying = stub.Classify.future(cifar.ClassifyRequest(packed_rgb=exports.stalling(50).tobytes()))
        while server.metric("admitted_images") < 50:
            time.sleep(0.01)

        deadline = grpc.StatusCode.DEADLINE_EXCEEDED
        one = cifar.ClassifyRequest(packed_rgb=bytes(IMAGE))
        late = [milliseconds(lambda: stub.Classify(one, timeout=0.1), deadline) - 100 for _ in range(50)]
        row("answer after a deadline of 100 ms (gRPC's), engine busy", late, "ms")

        tensor = inference.ModelInferRequest.InferInputTensor(name="images", datatype="UINT8", shape=[1, 32, 32, 3])
        with_timeout = inference.ModelInferRequest(
            model_name="cifar10", inputs=[tensor], raw_input_contents=[bytes(IMAGE)]
        )
        with_timeout.parameters["timeout"].int64_param = 100_000
        late = [milliseconds(lambda: open_stub.ModelInfer(with_timeout), deadline) - 100 for _ in range(50)]
        row("answer after a deadline of 100 ms (the request's own), engine busy", late, "ms")

        for _ in range(50):
            cancelled = stub.Classify.future(one)
            time.sleep(0.02)
            cancelled.cancel()
        time.sleep(0.5)
        spared = server.metric("spared_images_total")
        print(f"{'expired and cancelled images that the engine never saw':68s} {spared:.0f} of 150")

        filling = stub.Classify.future(cifar.ClassifyRequest(packed_rgb=exports.stalling(10).tobytes()))
        while server.metric("admitted_images") < 60:
            time.sleep(0.01)
        full = grpc.StatusCode.RESOURCE_EXHAUSTED
        refused = [milliseconds(lambda: stub.Classify(one), full) for _ in range(500)]
        row("RESOURCE_EXHAUSTED from a full queue, one caller", refused, "ms")
        occupying.cancel()
        filling.cancel()
        while server.metric("admitted_images"):
            time.sleep(0.01)
        seen = server.metric("engine_images_total")
        stub.Classify(one)
        print(f"{'images that the engine saw, of 711 asked about and not answered, and 1':68s} {seen:.0f}")


def bomb() -> None:
    """A PNG of few bytes that says it has 30,000 x 30,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    file = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(9000))) + chunk(b"IEND", b"")
    )
    with running() as server, grpc.insecure_channel(server.target) as channel:
        stub: Any = cifar_rpc.ImageClassifierStub(channel)  # type: ignore[no-untyped-call]
        times = []
        for _ in range(100):
            began = time.perf_counter()
            answer = stub.Classify(cifar.ClassifyRequest(images=[cifar.Image(encoded=file)]))
            times.append((time.perf_counter() - began) * 1000)
            if answer.results[0].error.code != grpc.StatusCode.INVALID_ARGUMENT.value[0]:
                raise SystemExit("the bomb was not refused")
        row(f"answer to a PNG of {len(file)} bytes and 30,000 x 30,000 pixels", times, "ms")


def flood(seconds: float, clients: int) -> None:
    """More images than fit, from many connections, on the shipped model."""
    with running() as server:
        outcomes: Counter[str] = Counter()
        refusals: list[float] = []
        stop = threading.Event()

        def ask(seed: int) -> None:
            sizes = itertools.cycle([300, 1, 40, 300, 128])
            options = [("grpc.use_local_subchannel_pool", 1)]
            with grpc.insecure_channel(server.target, options) as channel:
                stub: Any = cifar_rpc.ImageClassifierStub(channel)  # type: ignore[no-untyped-call]
                for size in itertools.islice(sizes, seed % 5, None):
                    if stop.is_set():
                        return
                    began = time.perf_counter()
                    try:
                        stub.Classify(cifar.ClassifyRequest(packed_rgb=bytes(size * IMAGE)))
                        outcomes["OK"] += 1
                    except grpc.RpcError as error:
                        outcomes[error.code().name] += 1
                        refusals.append((time.perf_counter() - began) * 1000)

        def load(duration: float) -> None:
            stop.clear()
            with ThreadPoolExecutor(clients) as pool:
                futures = [pool.submit(ask, seed) for seed in range(clients)]
                time.sleep(duration)
                stop.set()
                for future in futures:
                    future.result()

        load(3)  # so that what is allocated once has been
        time.sleep(2)
        before = server.resident
        outcomes.clear()
        refusals.clear()
        peak = [before]
        sampling = threading.Event()

        def sample() -> None:
            while not sampling.wait(0.2):
                peak.append(server.resident)

        sampler = threading.Thread(target=sample)
        sampler.start()
        load(seconds)
        sampling.set()
        sampler.join()
        time.sleep(2)
        print(
            f"{f'memory around a flood of {seconds:.0f} s from {clients} connections':68s} before {before:.0f}, "
            f"peak {max(peak):.0f}, after {server.resident:.0f} MiB   {dict(outcomes)}"
        )
        if refusals:
            row("RESOURCE_EXHAUSTED during it (client and server share the cores)", refusals, "ms")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Start, deadlines, refusals and memory of the server.")
    parser.add_argument("--starts", type=int, default=10, help="default: %(default)s")
    parser.add_argument("--flood-seconds", type=float, default=60, help="default: %(default)s")
    parser.add_argument("--flood-clients", type=int, default=40, help="default: %(default)s")
    arguments = parser.parse_args()
    start(arguments.starts)
    with tempfile.TemporaryDirectory() as folder:
        busy_engine(exports.write_export(Path(folder), exports.graph(0, loops=200)))
    bomb()
    flood(arguments.flood_seconds, arguments.flood_clients)


if __name__ == "__main__":
    main()
