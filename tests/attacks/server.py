"""A server of any checkout of this project, with its default options, for attacks to run against."""

import os
import signal
import tempfile
import time
from pathlib import Path

import grpc

from service.generated.cifar.v1 import image_classifier_pb2 as messages
from service.generated.cifar.v1 import image_classifier_pb2_grpc as rpc
from service.launch import ServerProcess
from tests.attacks.http2 import Target

# gRPC reads this name in small letters only. The loopback interface is behind no proxy.
os.environ["no_grpc_proxy"] = "127.0.0.1,localhost"  # noqa: SIM112


class AttackedServer(ServerProcess):
    """`python -m service` in the folder of a checkout; it can be asked for the number of its asyncio tasks.

    Args:
        checkout: The folder. Imports come from it, so that commits before and after a change can be compared.
        arguments: Options of the server.
    """

    def __init__(self, checkout: Path, *arguments: str) -> None:
        counting = Path(__file__).parent.resolve() / "count_tasks_on_signal"
        self._folder = tempfile.TemporaryDirectory()
        self._counts = Path(self._folder.name, "counts")
        self._counts.touch()
        environment = {"PYTHONPATH": str(counting), "TASK_COUNT_FILE": str(self._counts)}
        super().__init__(*arguments, environment=environment, folder=checkout)

    @property
    def victim(self) -> Target:
        """The server, as attacks need it."""
        return Target(self.port)

    @property
    def pid(self) -> int:
        """Of the server, or of the supervisor of its workers."""
        return self.process.pid

    def answers(self, seconds: float = 10.0) -> bool:
        """Whether it runs and answers a call over a new connection in time."""
        if self.process.poll() is not None:
            return False
        with self.victim.channel() as channel:
            try:
                rpc.ImageClassifierStub(channel).GetModel(  # type: ignore[no-untyped-call]
                    messages.GetModelRequest(), timeout=seconds, wait_for_ready=True
                )
            except grpc.RpcError:
                return False
        return True

    def tasks(self) -> int:
        """Number of asyncio tasks that are pending in it."""
        before = len(self._counts.read_text().splitlines())
        self.process.send_signal(signal.SIGUSR2)
        end = time.monotonic() + 10
        while len(counts := self._counts.read_text().splitlines()) == before:
            if time.monotonic() > end:
                raise TimeoutError("the server did not count its asyncio tasks within 10 s")
            time.sleep(0.05)
        return int(counts[-1])
