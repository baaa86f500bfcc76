"""Starts a server as a child process and follows its log: for the demo, the tests and the benchmarks.

    with ServerProcess("--variant", "int8") as server:
        server.ready()
        client = Client(server.target)

Uses the standard library only, so that it can start the server of another checkout or of another Python environment.
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from service.environment import ENVIRONMENT_PREFIX
from service.errors import StartError

START_SECONDS = 60.0
STOP_SECONDS = 60.0
# With one process the server itself says that it serves; with several the supervisor says it for all workers.
_SERVES = r'"all \d+ workers serve"|"serving (?!.*"worker")'
_METRICS_AT = "metrics at "
# The server listens on the loopback interface, so a proxy that the environment names must not be used.
_DIRECTLY = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class ServerProcess:
    """A child process that runs `python -m service` on a free port of the loopback interface and logs JSON.

    Its log, on standard error, is read by a thread as it arrives. The options that the server takes from environment
    variables are not inherited from this process: a variable that is set for another server does not change this one.

    Args:
        arguments: Further command-line options of the server.
        environment: Variables to set in addition to the inherited ones; PYTHONPATH among them selects another checkout.
        folder: Working directory. Python imports `service` from it if it is a checkout. None: the current directory.
        python: Interpreter that runs the server.
        prefix: A command that starts the server, with its own arguments, such as `("taskset", "-c", "0")`. It must
            replace itself with the server (exec), because signals are sent to its process.

    Attributes:
        process: The child process.
        lines: The lines of the log so far.

    Raises:
        OSError: The command cannot be started.
    """

    def __init__(
        self,
        *arguments: str | Path,
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
        python: str | Path = sys.executable,
        prefix: Sequence[str] = (),
    ) -> None:
        self.lines: list[str] = []
        self._arrived = threading.Condition()
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(ENVIRONMENT_PREFIX)}
        self.process = subprocess.Popen(  # noqa: S603 -- the caller chooses the command, not a user's input
            [*prefix, str(python), "-m", "service", "--log-format", "json", "--port", "0", *map(str, arguments)],
            cwd=folder,
            env={**inherited, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        self._reader = threading.Thread(target=self._read, name="server-log", daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.stop()
        finally:
            self.kill()

    def _read(self) -> None:
        for line in self.process.stderr or ():
            with self._arrived:
                self.lines.append(line)
                self._arrived.notify_all()
        with self._arrived:
            self._arrived.notify_all()

    def wait_for(self, pattern: str, count: int = 1, seconds: float = START_SECONDS) -> dict[str, Any]:
        """Waits for a line of the log.

        Args:
            pattern: Regular expression that is searched for in each line.
            count: Which of the matching lines to wait for; 1 is the first.
            seconds: How long to wait.

        Returns:
            The fields of that line.

        Raises:
            StartError: The server ended before it logged such a line.
            TimeoutError: No such line arrived in time.
        """
        end = time.monotonic() + seconds
        matching: list[str] = []
        seen = 0
        with self._arrived:
            while True:
                matching += [line for line in self.lines[seen:] if re.search(pattern, line)]
                seen = len(self.lines)
                if len(matching) >= count:
                    fields: dict[str, Any] = json.loads(matching[count - 1])
                    return fields
                if not self._reader.is_alive():
                    code = self.process.wait(STOP_SECONDS)
                    raise StartError(f"the server ended with exit code {code} and without /{pattern}/: {self._said()}")
                remaining = end - time.monotonic()
                if remaining <= 0:
                    raise TimeoutError(f"no /{pattern}/ in the server's log within {seconds} s: {self._said()}")
                # The end of the reader is noticed by polling: it is still alive when it notifies for the last time.
                self._arrived.wait(min(remaining, 0.2))

    def _said(self) -> str:
        return self.log.strip() or "its log is empty"

    def ready(self) -> Self:
        """Waits until the server, with all its workers, answers requests.

        Raises:
            StartError: The server could not start; the message holds its log.
            TimeoutError: It did not start in time.
        """
        self.wait_for(_SERVES)
        return self

    @property
    def port(self) -> int:
        """The port that the server listens on; waits until the log names it."""
        return int(self.wait_for('"port"')["port"])

    @property
    def target(self) -> str:
        """HOST:PORT for a client; waits like `port`."""
        return f"127.0.0.1:{self.port}"

    @property
    def http_url(self) -> str:
        """The address for HTTP, without a slash at the end; waits until the log names it. Needs --http-port."""
        return str(self.wait_for('"http_url"')["http_url"]).rstrip("/")

    def metrics(self) -> dict[str, float]:
        """The current metrics: values by name with labels. The server needs the option --metrics-port."""
        address = str(self.wait_for(_METRICS_AT)["message"]).removeprefix(_METRICS_AT)
        with _DIRECTLY.open(address, timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        return {
            name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        }

    def stop(self, number: int = signal.SIGTERM, seconds: float = STOP_SECONDS) -> int:
        """Sends a signal, SIGTERM by default, waits until the process has ended and returns its exit code.

        Raises:
            subprocess.TimeoutExpired: It has not ended within `seconds`.
        """
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.wait(seconds)

    def wait(self, seconds: float = STOP_SECONDS) -> int:
        """Waits until the process has ended and its log is complete; returns its exit code.

        Raises:
            subprocess.TimeoutExpired: It has not ended within `seconds`.
        """
        code = self.process.wait(seconds)
        self._reader.join(10)
        return code

    def kill(self) -> None:
        """Ends the process with SIGKILL if it still runs."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(STOP_SECONDS)

    @property
    def log(self) -> str:
        """The whole log so far."""
        return "".join(self.lines)
