"""One worker process, as its supervisor sees it."""

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from service import logs
from service.settings import Settings
from service.workers.hang import HangDetector, read_activity
from service.workers.pipe import Kind, Receiver

logger = logging.getLogger(__name__)

# Time that a worker with a stuck engine has to answer its other requests.
STUCK_SECONDS = 2.0


class WorkerProcess:
    """A worker that was started; `ended` is its exit code once it has ended, negative for a signal.

    The worker leads a process group of its own: Ctrl-C in a terminal reaches the supervisor alone, and processes that
    the worker started are ended together with it.

    Args:
        number: Number of the worker, from 1.
        settings: Settings of the worker.
        metrics_folder: Folder to which the worker writes its metrics.
        temporary_folder: Folder to which the worker writes its other temporary files.
        exports: File descriptor of the list of exports that the workers share.
        on_ready: Called when the worker starts to serve.

    Raises:
        OSError: The process cannot be started, for example because no file descriptor or no memory is free.
    """

    def __init__(
        self,
        number: int,
        settings: Settings,
        metrics_folder: Path,
        temporary_folder: Path,
        exports: int,
        on_ready: Callable[[], None],
    ) -> None:
        self.number = number
        self.refusal = ""  # why it did not start
        self.ready_at: float | None = None  # on time.monotonic()
        self._stuck_at: float | None = None  # on time.monotonic()
        self._hung = ""  # why it was killed
        self._on_ready = on_ready
        reading, writing = os.pipe()
        try:
            descriptors = (writing, logs.log_descriptor(), exports)
            self._process = subprocess.Popen(  # noqa: S603 -- our own program
                [
                    sys.executable, "-m", "service.workers", settings.model_dump_json(),
                    str(number), *map(str, descriptors), str(os.getpid()),
                ],
                pass_fds=descriptors,
                env={
                    **os.environ,
                    "PROMETHEUS_MULTIPROC_DIR": str(metrics_folder),
                    "TMPDIR": str(temporary_folder),
                },
                process_group=0,
            )  # fmt: skip
        except OSError:
            os.close(reading)
            raise
        finally:
            os.close(writing)
        self.pid = self._process.pid
        self._hang = HangDetector(lambda: read_activity(self.pid))
        self._receiver = Receiver(reading)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(reading, self._receive)
        self.ended: asyncio.Future[int] = self._loop.create_future()

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal to the worker, not to the processes that it started."""
        if self._process.returncode is None:
            # Not Popen.send_signal, which would collect the exit code that `reap` waits for.
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Ends the worker and the processes that it started at once."""
        if self._process.returncode is None:  # otherwise its process id may belong to another process
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)

    def kill_if_hanging(self) -> None:
        """Kills the worker if it hangs or reports that its engine is stuck. Call it every CHECK_SECONDS."""
        if self._hung:
            return
        reason = self._hang.check()
        if reason:
            self._hung = "hang"
        elif self._stuck_at is not None and time.monotonic() - self._stuck_at > STUCK_SECONDS:
            self._hung, reason = "stuck", "its engine does not return from a batch"
        if self._hung:
            logger.error("worker %d is killed: %s", self.number, reason)
            self.kill()

    def why_it_ended(self, code: int) -> tuple[str, str]:
        """The reason why it ended with this exit code, as a word for the metrics and as a phrase for the log."""
        if self.refusal:
            return "start", self.refusal
        if code >= 0:
            return "exit", f"exit code {code}"
        try:
            name = signal.Signals(-code).name
        except ValueError:  # a real-time signal
            name = str(-code)
        return self._hung or "signal", f"signal {name}"

    def ready_seconds(self) -> float | None:
        """For how many seconds it has been serving, or None if it never did."""
        return None if self.ready_at is None else time.monotonic() - self.ready_at

    def reap(self) -> None:
        """Sets `ended` if the process has ended."""
        if self._process.returncode is not None:
            return
        if os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            return
        self.kill()  # ends processes that it left behind, while its process id cannot yet belong to another process
        code = self._process.wait()
        self._receive()  # messages that it sent before its end
        self._loop.remove_reader(self._receiver.fileno())
        self._receiver.close()
        self.ended.set_result(code)

    def _receive(self) -> None:
        messages = self._receiver.receive()
        if messages is None:
            self._loop.remove_reader(self._receiver.fileno())
            return
        for message in messages:
            if message.kind is Kind.REFUSED:
                self.refusal = message.reason
            elif message.kind is Kind.READY:
                self.ready_at = time.monotonic()
                self._hang.on_ready()
                self._on_ready()
            else:
                if message.kind is Kind.HEALTHY:
                    self._stuck_at = None
                elif self._stuck_at is None:
                    self._stuck_at = time.monotonic()
                self._hang.on_heartbeat()
