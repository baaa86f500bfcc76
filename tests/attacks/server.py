"""A server of any checkout of this project, with its default options, for attacks to run against."""

import itertools
import os
import signal
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
        super().__init__(*arguments, environment={"PYTHONPATH": str(counting)}, folder=checkout)
        self._counts = itertools.count(1)

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
        self.process.send_signal(signal.SIGUSR2)
        return int(self.wait_for('"pending tasks"', count=next(self._counts), seconds=10)["count"])
