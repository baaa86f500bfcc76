"""Many HTTP clients for a while, while models are replaced and workers are drained: is each request answered correctly?

    python benchmarks/http_soak.py [--clients 200] [--images 100000]

Starts two workers that serve a copy of the shipped model. Every few seconds the export is replaced (fp32 by int8 and
back), or a worker gets SIGTERM, finishes its requests and is replaced. Each answer is compared with what onnxruntime
computes for one of the two models. Prints one table; the exit code is 1 if a request was lost or answered wrongly.

A request is lost if it ends without an answer. Refusals (429, 503, connection refused) are counted and sent again.
"""

import argparse
import asyncio
import collections
import contextlib
import io
import json
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import aiohttp
import numpy as np
import onnxruntime
import psutil
from numpy.typing import NDArray
from PIL import Image
from tabulate import tabulate

from service.launch import ServerProcess

REPOSITORY = Path(__file__).parents[1]
POOL = 512
TOLERANCE = 5e-3
PAUSE_SECONDS = 0.05
VARIANTS = ("fp32", "int8")

Images = NDArray[np.uint8]


class Exports:
    """A folder with a copy of the shipped export, whose variant "fp32" is one of the two models.

    Attributes:
        expected: Probabilities of the images of the pool, for each model.
    """

    def __init__(self, folder: Path, pool: Images) -> None:
        self.folder = folder
        shutil.copytree(REPOSITORY / "exported", folder)
        self._manifest = json.loads((folder / "manifest.json").read_text())
        self._used = 0
        self.expected = [self._compute(folder / self._manifest["variants"][name]["file"], pool) for name in VARIANTS]

    @staticmethod
    def _compute(path: Path, pool: Images) -> NDArray[np.float32]:
        session = onnxruntime.InferenceSession(path)
        parts = [session.run(["probabilities"], {"images": part})[0] for part in np.split(pool, POOL // 32)]
        return np.concatenate(parts)

    def swap(self) -> None:
        """Replaces the model by the other one."""
        self._used = 1 - self._used
        variants = {**self._manifest["variants"], "fp32": self._manifest["variants"][VARIANTS[self._used]]}
        new = self.folder / "manifest.json.new"
        new.write_text(json.dumps({**self._manifest, "variants": variants}))
        new.replace(self.folder / "manifest.json")


class Clients:
    """The clients, and what they saw.

    Args:
        url: The server.
        pool: The images that they send.
        expected: Probabilities of these images, for each model.
        images: Number of images after whose answers they stop.
    """

    def __init__(self, url: str, pool: Images, expected: list[NDArray[np.float32]], images: int) -> None:
        self.seen: collections.Counter[str] = collections.Counter()
        self.answered = 0
        self.seconds: list[float] = []
        self.versions: collections.Counter[str] = collections.Counter()
        self._url, self._pool, self._expected, self._images = url, pool, expected, images
        self._files = [_png(image) for image in pool]
        self._classes: list[str] = []

    async def run(self, count: int) -> None:
        """Runs this many clients until enough images were answered."""
        async with aiohttp.ClientSession(f"{self._url}/") as session, session.get("v1/model") as reply:
            self._classes = (await reply.json())["classes"]
        async with asyncio.TaskGroup() as group:
            for number in range(count):
                group.create_task(self._client(np.random.default_rng(number)))

    async def _client(self, generator: np.random.Generator) -> None:
        kinds: list[Callable[[aiohttp.ClientSession, NDArray[np.int64]], Awaitable[tuple[Images, str]]]]
        kinds = [self._binary, self._binary, self._json, self._files_of]
        async with aiohttp.ClientSession(
            f"{self._url}/", connector=aiohttp.TCPConnector(limit=1), timeout=aiohttp.ClientTimeout(120)
        ) as session:
            while self.answered < self._images:
                rows = generator.integers(0, POOL, generator.integers(1, 17))
                send = kinds[generator.integers(len(kinds))]
                began = time.perf_counter()
                try:
                    probabilities, version = await send(session, rows)
                except aiohttp.ClientConnectorError:
                    self.seen["connection refused"] += 1
                    await asyncio.sleep(PAUSE_SECONDS)
                except aiohttp.ClientResponseError as error:
                    self.seen[f"{error.status} {error.message}"] += 1
                    await asyncio.sleep(PAUSE_SECONDS)
                except (aiohttp.ClientError, OSError, TimeoutError) as error:
                    self.seen[f"lost: {type(error).__name__}"] += 1
                else:
                    self._check(rows, probabilities, version, time.perf_counter() - began)

    def _check(self, rows: NDArray[np.int64], probabilities: Images, version: str, seconds: float) -> None:
        right = any(np.abs(probabilities - each[rows]).max() < TOLERANCE for each in self._expected)
        self.seen["answered correctly" if right else "answered wrongly"] += 1
        self.versions[version] += 1
        self.answered += len(rows)
        self.seconds.append(seconds)

    async def _binary(self, session: aiohttp.ClientSession, rows: NDArray[np.int64]) -> tuple[Images, str]:
        raw = self._pool[rows].tobytes()
        tensor = {**_tensor(rows), "parameters": {"binary_data_size": len(raw)}}
        outputs = [{"name": "probabilities", "parameters": {"binary_data": True}}]
        head = json.dumps({"inputs": [tensor], "outputs": outputs}).encode()
        headers = {"Inference-Header-Content-Length": str(len(head))}
        async with session.post("v2/models/cifar10/infer", data=head + raw, headers=headers) as reply:
            reply.raise_for_status()
            content = await reply.read()
        end = int(reply.headers["Inference-Header-Content-Length"])
        values = np.frombuffer(content[end:], "<f4").reshape(len(rows), -1)
        return values, json.loads(content[:end])["model_version"]

    async def _json(self, session: aiohttp.ClientSession, rows: NDArray[np.int64]) -> tuple[Images, str]:
        tensor = {**_tensor(rows), "data": self._pool[rows].ravel().tolist()}
        body = {"inputs": [tensor], "outputs": [{"name": "probabilities"}]}
        async with session.post("v2/models/cifar10/infer", json=body) as reply:
            reply.raise_for_status()
            answer = await reply.json()
        return np.array(answer["outputs"][0]["data"]).reshape(len(rows), -1), answer["model_version"]

    async def _files_of(self, session: aiohttp.ClientSession, rows: NDArray[np.int64]) -> tuple[Images, str]:
        form = aiohttp.FormData()
        for row in rows.tolist():
            form.add_field("image", self._files[row], filename=f"{row}.png")
        async with session.post("v1/classify", data=form) as reply:
            reply.raise_for_status()
            answer = await reply.json()
        table = [
            [{each["name"]: each["probability"] for each in result["classes"]}[name] for name in self._classes]
            for result in answer["results"]
        ]
        return np.array(table), f"export {answer['model']['version']}"


def _tensor(rows: NDArray[np.int64]) -> dict[str, object]:
    return {"name": "images", "datatype": "UINT8", "shape": [len(rows), 32, 32, 3]}


def _png(image: Images) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def _pool() -> Images:
    """Coloured gradients with noise."""
    generator = np.random.default_rng(0)
    rows = np.linspace(0, 1, 32)
    ends = generator.integers(0, 256, (POOL, 2, 3))
    slopes = ends[:, :1] + (ends[:, 1:] - ends[:, :1]) * rows[None, :, None]
    noise = generator.normal(0, 20, (POOL, 32, 32, 3))
    return np.clip(slopes[:, :, None, :] + noise, 0, 255).astype(np.uint8)


async def _disturb(
    server: ServerProcess,
    exports: Exports,
    pause: float,
    events: collections.Counter[str],
    drained: list[psutil.Process],
) -> None:
    """Replaces the model and drains workers, in turn; adds the workers to `drained`."""
    supervisor = psutil.Process(server.process.pid)
    while True:
        await asyncio.sleep(pause)
        exports.swap()
        events["models replaced"] += 1
        await asyncio.sleep(pause)
        workers = [each for each in supervisor.children() if each not in drained]
        if workers:
            oldest = min(workers, key=lambda each: each.create_time())
            drained.append(oldest)
            oldest.send_signal(signal.SIGTERM)
            events["workers drained"] += 1


async def _run(clients: Clients, count: int, server: ServerProcess, exports: Exports, pause: float) -> dict[str, int]:
    events: collections.Counter[str] = collections.Counter()
    drained: list[psutil.Process] = []
    disturbing = asyncio.create_task(_disturb(server, exports, pause, events, drained))
    await clients.run(count)
    disturbing.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await disturbing  # raises what went wrong with the disturbances
    psutil.wait_procs(drained, timeout=60)  # a second SIGTERM would end a worker that still drains
    return events


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description="HTTP clients while models are replaced and workers drained; checks answers."
    )
    parser.add_argument("--clients", type=int, default=200, help="number of clients; default: %(default)s")
    parser.add_argument("--images", type=int, default=100_000, help="number of images; default: %(default)s")
    parser.add_argument("--pause", type=float, default=4.0, help="seconds between disturbances; default: %(default)s")
    arguments = parser.parse_args()
    pool = _pool()
    with tempfile.TemporaryDirectory() as folder:
        exports = Exports(Path(folder, "export"), pool)
        options = ("--model", exports.folder, "--workers", "2", "--http-port", "0", "--device", "cpu")
        with ServerProcess(*options, folder=REPOSITORY) as server:
            clients = Clients(server.ready().http_url, pool, exports.expected, arguments.images)
            began = time.perf_counter()
            events = asyncio.run(_run(clients, arguments.clients, server, exports, arguments.pause))
            seconds = time.perf_counter() - began
            code = server.stop()
    rows = [
        ("images answered", clients.answered),
        ("images/s", round(clients.answered / seconds)),
        *sorted(clients.seen.items()),
        *sorted(events.items()),
        ("versions that answered", len(clients.versions)),
        ("median, 99 % of the times to answer (s)", np.round(np.percentile(clients.seconds, [50, 99]), 3).tolist()),
        ("exit code of the server", code),
    ]
    print(tabulate(rows, tablefmt="github"))
    failed = code or any(kind.startswith("lost") or "wrongly" in kind for kind in clients.seen)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
