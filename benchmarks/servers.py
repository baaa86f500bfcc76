"""The servers that `serving.py` compares, and how each is installed, started, measured and stopped.

Each peer runs in a virtual environment of its own, which is made on demand with the versions that are named here. All
Python peers compute with the same onnxruntime session (peers/session.py). Their scripts in peers/ are configured as
their documentation recommends.
"""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil
from processes import cpu_seconds, memory, process_tree

from cifar_core.processor import has_bf16
from service.errors import StartError
from service.launch import ServerProcess

REPOSITORY = Path(__file__).parents[1]
PEERS = REPOSITORY / "benchmarks/peers"
OPENVINO = REPOSITORY / ".venv/openvino"
"""The onnxruntime with OpenVINO that `make bench-serving` installs. Without it, servers with OpenVINO are left out."""
ONNXRUNTIME = "onnxruntime==1.32.0"
CLASSIFY = "/cifar.v1.ImageClassifier/Classify"
MODEL_INFER = "/inference.GRPCInferenceService/ModelInfer"


@dataclass(frozen=True)
class Server:
    """One way to serve the model.

    Attributes:
        name: Name in the table and on the command line.
        method: gRPC method that is called; None for HTTP.
        options: Command-line options, if it is our server.
        checkout: Folder that our server is imported from.
        script: File in peers/ that starts it, if it is a peer; None for our server.
        requirements: Packages of the peer's virtual environment, besides onnxruntime; none: it runs in this one.
        python: Interpreter that makes the virtual environment.
        environment: Variables to set.
        connections: Number of connections that the load is spread over; several where processes share the port.
    """

    name: str
    method: str | None = CLASSIFY
    options: tuple[str, ...] = ()
    checkout: Path = REPOSITORY
    script: str | None = None
    requirements: tuple[str, ...] = ()
    python: str = sys.executable
    environment: dict[str, str] = field(default_factory=dict)
    connections: int = 1


# With a queue of 512 images an accepted request waits a third of a second at most, on two cores.
QUEUE = ("--max-queued-images", "512", "--max-images", "256")
OURS = (
    Server("ours", options=QUEUE),
    Server("ours with the Open Inference Protocol", MODEL_INFER, QUEUE),
    Server("ours with two workers", options=(*QUEUE, "--workers", "2"), connections=16),
    Server("ours in int8", options=(*QUEUE, "--variant", "int8")),
    *(
        Server(
            f"ours with OpenVINO in {variant}",
            options=(*QUEUE, "--device", "openvino", "--variant", variant),
            environment={"PYTHONPATH": str(OPENVINO)},
        )
        for variant in ("fp32", "bf16", "int8")
        if OPENVINO.exists() and (variant != "bf16" or has_bf16())
    ),
)
PEER_SERVERS = (
    Server(
        "plain",  # what one writes in an afternoon
        MODEL_INFER,
        script="plain.py",
        environment={"PYTHONPATH": str(REPOSITORY)},
    ),
    Server(
        "Triton",
        MODEL_INFER,
        script="triton.py",
        requirements=("nvidia-pytriton==0.5.14", "numpy<2"),
        python="/usr/bin/python3",  # its binary works with Debian's build of Python only
    ),
    Server("MLServer", MODEL_INFER, script="mlserver_start.py", requirements=("mlserver==1.7.1",)),
    Server(
        "Ray Serve",
        MODEL_INFER,
        script="ray_start.py",
        requirements=("ray[serve,serve-grpc]==2.60.0",),
        environment={"PYTHONPATH": f"{REPOSITORY}:{PEERS}"},
    ),
    Server("LitServe", None, script="litserve_start.py", requirements=("litserve==0.2.19",)),
)


def all_servers(before: Path | None = None) -> tuple[Server, ...]:
    """Our server in each of its forms, and the peers.

    Args:
        before: Folder of another checkout, whose server is added in the same forms under names that begin with
            "before".
    """
    earlier = [replace(each, name=each.name.replace("ours", "before"), checkout=before) for each in OURS if before]
    return (*OURS, *earlier, *PEER_SERVERS)


def install(server: Server, folder: Path) -> Path:
    """The Python interpreter that runs a server; its virtual environment is made below `folder` if it is missing."""
    if not server.requirements:
        return Path(sys.executable)
    place = folder / Path(str(server.script)).stem
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
    """A free port whose next port is free too."""
    while True:
        with socket.socket() as one, socket.socket() as other, suppress(OSError):
            one.bind(("127.0.0.1", 0))
            port = int(one.getsockname()[1])
            other.bind(("127.0.0.1", port + 1))
            return port


class Running:
    """A server that runs.

    Args:
        pid: Of its first process.
        port: That it listens on.
        log: Returns what it has printed.

    Attributes:
        peak_memory: The most memory that `note_memory` has found, in MiB.
    """

    def __init__(self, pid: int, port: int, log: Callable[[], str]) -> None:
        self.pid, self.port, self.log = pid, port, log
        self.peak_memory = 0.0

    def note_memory(self) -> None:
        """Measures its memory now. Not to be called during a load: counting shared pages delays the processes."""
        self.peak_memory = max(self.peak_memory, memory(self.pid))

    def memory(self) -> float:
        """Memory of all its processes now, in MiB."""
        return memory(self.pid)

    def cpu_seconds(self) -> float:
        """Processor time of all its processes until now."""
        return cpu_seconds(self.pid)


@contextmanager
def started(server: Server, python: Path, model: Path, threads: int, log: Path) -> Iterator[Running]:
    """Runs a server until the end of a `with`.

    Args:
        server: What to start.
        python: Interpreter of its virtual environment.
        model: The ONNX file, in the folder of an export.
        threads: Number of onnxruntime's threads, over all processes.
        log: File for what a peer prints.
    """
    running = _ours(server, model) if server.script is None else _peer(server, python, model, threads, log)
    with running as measured:
        yield measured
    time.sleep(0.5)


@contextmanager
def _ours(server: Server, model: Path) -> Iterator[Running]:
    options = ["--model", str(model.parent), *server.options]
    with ServerProcess(*options, environment=server.environment, folder=server.checkout) as process:
        try:
            process.ready()
        except StartError as error:
            raise SystemExit(f"{server.name} did not start: {error}") from error
        yield Running(process.process.pid, process.port, lambda: process.log)


@contextmanager
def _peer(server: Server, python: Path, model: Path, threads: int, log: Path) -> Iterator[Running]:
    port = free_port()
    variables = {**os.environ, **server.environment, "MODEL": str(model), "THREADS": str(threads), "PORT": str(port)}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(python), str(server.script)], cwd=PEERS, env=variables, stdout=output, stderr=output,
            start_new_session=True,
        )  # fmt: skip
        try:
            yield Running(process.pid, port, lambda: log.read_text(errors="replace"))
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Stops a process with SIGTERM, and whatever is left of its descendants with SIGKILL."""
    tree = process_tree(process.pid)
    process.terminate()
    _, alive = psutil.wait_procs(tree, timeout=8)
    for each in alive:
        with suppress(psutil.Error):
            each.kill()
    psutil.wait_procs(alive, timeout=5)
    process.wait(20)
