"""Several servers on one machine, and one client that calls them without a pause while they come and go."""

import contextlib
import socket
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

from service.client import Client, Options
from tests.service.conftest import Server, until
from tests.service.exports import CLASSES, expected, pictures

CLASSIFIED = 'cifar_service_images_total{outcome="classified"}'
THREADS = 32


def free_port(hosts: Sequence[str]) -> int:
    """A port that is free at all these addresses."""
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(socket.create_server((hosts[0], 0)))
        port: int = first.getsockname()[1]
        for host in hosts[1:]:
            stack.enter_context(socket.create_server((host, port)))
        return port


class Replica:
    """A server with an address of its own, which can be replaced by another one at the same address."""

    def __init__(self, host: str, port: int, *arguments: str | Path) -> None:
        self.host, self.address = host, f"{host}:{port}"
        self._arguments = ("--host", host, "--port", str(port), "--metrics-port", "0", *arguments)
        self.server = Server(*self._arguments)

    def classified(self) -> int:
        """Number of images that the present server has classified."""
        return int(self.server.metrics()[CLASSIFIED])

    def start_again(self) -> None:
        """Starts another server at the same address and waits until it has answered calls."""
        self.server = Server(*self._arguments).ready()
        until(lambda: self.classified() > 0)


class Replicas:
    """Servers at different addresses of the loopback interface, all at one port; they end with the `with` block.

    Args:
        model: Export that they serve.
        hosts: An address for each server.
        arguments: Further options of the servers.
        port: Their port; 0 for a free one.
    """

    def __init__(self, model: Path, hosts: Sequence[str], *arguments: str, port: int = 0) -> None:
        self.port = port or free_port(hosts)
        self._arguments = ("--model", model, "--threads", "1", "--decode-processes", "1", *arguments)
        self.all: list[Replica] = []
        try:
            for host in hosts:
                self.add(host)
        except BaseException:
            self.__exit__()
            raise

    def add(self, host: str) -> Replica:
        """Starts one more server."""
        replica = Replica(host, self.port, *self._arguments)
        self.all.append(replica)
        replica.server.ready()
        return replica

    @property
    def target(self) -> str:
        """All addresses, for a client."""
        return ",".join(replica.address for replica in self.all)

    def shares(self) -> list[float]:
        """The share of each server in all images that were classified, in percent."""
        counts = [replica.classified() for replica in self.all]
        return [100 * count / sum(counts) for count in counts]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for replica in self.all:
            replica.server.kill()


class Load:
    """Threads that classify single images through one client, and check every answer.

    Attributes:
        answered: Number of calls that were answered correctly.
        problems: What went wrong in all other calls.
    """

    def __init__(self, client: Client) -> None:
        self.answered = 0
        self.problems: list[str] = []
        self._client = client
        self._images = pictures(500)
        self._names = [CLASSES[row.argmax()] for row in expected(0, self._images)]
        self._lock = threading.Lock()

    def run(self, calls: int) -> None:
        """Makes this many calls; returns when all have ended."""
        remaining = iter(range(calls))

        def next_number() -> int | None:
            with self._lock:
                return next(remaining, None)

        self._in_threads(lambda: iter(next_number, None))

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Makes calls for the length of a `with` block."""
        ended = threading.Event()

        def numbers() -> Iterator[int]:
            number = 0
            while not ended.is_set():
                yield number
                number += 1

        whole = threading.Thread(target=self._in_threads, args=(numbers,))
        whole.start()
        try:
            yield
        finally:
            ended.set()
            whole.join()

    def wait_for_more(self, calls: int) -> None:
        """Waits until this many more calls have been answered."""
        wanted = self.answered + calls
        until(lambda: self.answered >= wanted, seconds=120)

    def _in_threads(self, numbers) -> None:
        threads = [threading.Thread(target=self._call_all, args=(numbers(),)) for _ in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _call_all(self, numbers: Iterator[int]) -> None:
        for number in numbers:
            row = number % len(self._images)
            try:
                (answer,) = self._client.classify(self._images[row : row + 1], top_k=1)
                problem = "" if answer.best.name == self._names[row] else f"image {row} is {answer.best.name}"
            except Exception as error:  # noqa: BLE001 -- whatever it is, the call was lost
                problem = repr(error)
            with self._lock:
                if problem:
                    self.problems.append(problem)
                else:
                    self.answered += 1


@contextlib.contextmanager
def load_on(target: str, servers: int) -> Iterator[Load]:
    """A load through one client."""
    with Client(target, Options(max_shared_requests=2 if "," in target else 2 * servers)) as client:
        yield Load(client)


def restart_one_after_another(replicas: Replicas, load: Load) -> None:
    """Replaces every server as a rolling update does, while the load runs."""
    with load.running():
        load.wait_for_more(500)
        for replica in replicas.all:
            assert replica.server.stop() == 0, replica.server.log
            load.wait_for_more(200)
            replica.start_again()


def kill_one(replicas: Replicas, load: Load) -> None:
    """Kills a server that is answering calls, and starts it again."""
    victim = replicas.all[0]
    with load.running():
        load.wait_for_more(500)
        victim.server.kill()
        load.wait_for_more(500)
        victim.start_again()
