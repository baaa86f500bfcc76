"""The servers that `serving.py` compares: how each is installed, started, watched and stopped.

Each peer gets a virtual environment of its own, made on demand with the versions named here, and computes with the
same onnxruntime session (peers/session.py). Their scripts in peers/ are set as their documentation advises.
"""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).parents[1]
PEERS = REPOSITORY / "benchmarks/peers"
ONNXRUNTIME = "onnxruntime==1.32.0"
CLASSIFY = "/cifar.v1.ImageClassifier/Classify"
MODEL_INFER = "/inference.GRPCInferenceService/ModelInfer"


@dataclass(frozen=True)
class Server:
    """One way to serve the model.

    Attributes:
        name: In the table.
        method: gRPC method that answers; None for HTTP.
        options: Of our server.
        script: Of a peer, in peers/; None for our server.
        requirements: What its virtual environment holds besides onnxruntime.
        python: That makes its virtual environment.
        connections: That the load is spread over; several where several processes share the port.
    """

    name: str
    method: str | None = CLASSIFY
    options: tuple[str, ...] = ()
    script: str | None = None
    requirements: tuple[str, ...] = ()
    python: str = sys.executable
    environment: dict[str, str] = field(default_factory=dict)
    connections: int = 1


# A queue of 512 images bounds the latency of what is accepted to about a third of a second here.
QUEUE = ("--max-queued-images", "512", "--max-images", "256")
SERVERS = (
    Server("ours", options=QUEUE),
    Server("ours, Open Inference Protocol", MODEL_INFER, QUEUE),
    Server("ours, two workers", options=(*QUEUE, "--workers", "2"), connections=16),
    Server("ours, int8", options=(*QUEUE, "--variant", "int8")),
    Server(
        "Triton",
        MODEL_INFER,
        script="triton.py",
        requirements=("nvidia-pytriton==0.5.14", "numpy<2"),
        python="/usr/bin/python3",  # its binary starts under Debian's build of Python only
    ),
    Server("MLServer", MODEL_INFER, script="mlserver_start.py", requirements=("mlserver==1.7.1",)),
    Server(
        "Ray Serve",
        MODEL_INFER,
        script="ray_start.py",
        requirements=("ray[serve,serve-grpc]==2.60.0",),
        environment={"PYTHONPATH": f"{REPOSITORY}:{PEERS}"},
    ),
    Server("LitServe (HTTP)", None, script="litserve_start.py", requirements=("litserve==0.2.19",)),
)


def install(server: Server, folder: Path) -> Path:
    """The Python of a server's virtual environment below a folder, made if need be."""
    if server.script is None:
        return Path(sys.executable)
    place = folder / Path(server.script).stem
    ready = place / ".ready"
    wanted = " ".join((*server.requirements, ONNXRUNTIME))
    if not ready.exists() or ready.read_text() != wanted:
        print(f"installing {server.name}: {wanted}", file=sys.stderr)
        subprocess.run([server.python, "-m", "venv", "--clear", str(place)], check=True)
        pip = [str(place / "bin/python"), "-m", "pip", "install", "--quiet", *server.requirements, ONNXRUNTIME]
        subprocess.run(pip, check=True)
        ready.write_text(wanted)
    return place / "bin/python"


def free_port() -> int:
    """A port that nobody has, and the next one neither."""
    while True:
        with socket.socket() as one, socket.socket() as other, suppress(OSError):
            one.bind(("127.0.0.1", 0))
            port = int(one.getsockname()[1])
            other.bind(("127.0.0.1", port + 1))
            return port


class Running:
    """A started server's processes: their CPU seconds, and the most memory they were seen to hold together."""

    def __init__(self, process: subprocess.Popen[bytes], port: int) -> None:
        self.port = port
        self._process = psutil.Process(process.pid)
        self._ended: dict[int, float] = {}
        self.peak_memory = 0

    def _tree(self) -> list[psutil.Process]:
        with suppress(psutil.NoSuchProcess):
            return [self._process, *self._process.children(recursive=True)]
        return []

    def note_memory(self) -> None:
        """Looks how much they hold now. Not while a load runs: to count shared pages holds up the processes."""
        held = 0
        for process in self._tree():
            with suppress(psutil.Error):
                held += process.memory_full_info().pss  # pages that several share count once
        self.peak_memory = max(self.peak_memory, held)

    def resident_memory(self) -> int:
        """Bytes that all its processes hold now."""
        held = 0
        for process in self._tree():
            with suppress(psutil.Error):
                held += process.memory_info().rss
        return held

    def cpu_seconds(self) -> float:
        """Of all its processes until now, those that ended too."""
        for process in self._tree():
            with suppress(psutil.Error):
                times = process.cpu_times()
                self._ended[process.pid] = times.user + times.system
        return sum(self._ended.values())

    def end(self) -> None:
        """Stops the processes, by force where they do not go by themselves."""
        tree = self._tree()
        for process in tree[:1]:
            with suppress(psutil.Error):
                process.terminate()
        _, alive = psutil.wait_procs(tree, timeout=8)
        for process in alive:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(alive, timeout=5)


@contextmanager
def started(server: Server, python: Path, model: Path, threads: int, log: Path) -> Iterator[Running]:
    """Runs a server for the length of a `with`. Its output goes to a file.

    Args:
        server: What to start.
        python: Of its virtual environment.
        model: The ONNX file, in the folder of an export.
        threads: Of onnxruntime, over all processes.
        log: For what it prints.
    """
    port = free_port()
    if server.script is None:
        command = [str(python), "-m", "service", "--port", str(port), "--model", str(model.parent)]
        command += ["--log-level", "warning", *server.options]
        folder = REPOSITORY
    else:
        command = [str(python), server.script]
        folder = PEERS
    environment = {**os.environ, **server.environment, "MODEL": str(model), "THREADS": str(threads), "PORT": str(port)}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=output, stderr=output, start_new_session=True
        )
        running = Running(process, port)
        try:
            yield running
        finally:
            running.end()
            process.wait(20)
            time.sleep(0.5)
