"""Processes that take turns on a machine, so that a change of its speed affects all of them alike."""

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Timed:
    """A process that has ended.

    Attributes:
        seconds: how long it ran, without the time in which it was stopped.
        lines: what it printed: seconds of running until then, and the line.
    """

    seconds: float = 0.0
    lines: list[tuple[float, str]] = field(default_factory=list)


class Contender:
    """Commands that are run one after another, whenever it is their turn; between its turns the process is stopped.

    Args:
        name: name of the contender.
        commands: programs with their arguments.
    """

    def __init__(self, name: str, commands: Sequence[Sequence[str]]) -> None:
        self.name = name
        self.ended: list[Timed] = []
        self._commands = list(commands)
        self._process: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None
        self._timed = Timed()
        self._continued = 0.0

    @property
    def is_finished(self) -> bool:
        """Whether all commands have ended."""
        return len(self.ended) == len(self._commands)

    def run(self, seconds: float | None) -> None:
        """Runs for one turn, or to the end if `seconds` is None.

        Raises:
            subprocess.CalledProcessError: A command failed.
        """
        ends = None if seconds is None else time.perf_counter() + seconds
        while not self.is_finished:
            self._continued = time.perf_counter()
            process = self._continue()
            try:
                process.wait(None if ends is None else max(0.0, ends - time.perf_counter()))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGSTOP)
                self._timed.seconds += time.perf_counter() - self._continued
                return
            self._timed.seconds += time.perf_counter() - self._continued
            self._end(process)

    def kill(self) -> None:
        """Ends the process that is running or stopped, if there is one."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _continue(self) -> subprocess.Popen[str]:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGCONT)
            return self._process
        self._timed = Timed()
        self._process = subprocess.Popen(
            self._commands[len(self.ended)],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
            start_new_session=True,  # signals reach its children as well
        )
        self._reader = threading.Thread(target=self._read, args=(self._process, self._timed), daemon=True)
        self._reader.start()
        return self._process

    def _read(self, process: subprocess.Popen[str], timed: Timed) -> None:
        if process.stdout is None:
            return
        for line in process.stdout:
            timed.lines.append((timed.seconds + time.perf_counter() - self._continued, line.rstrip("\n")))

    def _end(self, process: subprocess.Popen[str]) -> None:
        if self._reader is not None:
            self._reader.join()
        self._process = None
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, process.args)
        self.ended.append(self._timed)


def take_turns(contenders: Sequence[Contender], seconds: float) -> None:
    """Runs all contenders to their ends.

    Args:
        contenders: they keep their memory between their turns, so all must fit into memory together.
        seconds: length of a turn; 0 runs each contender to its end before the next one.

    Raises:
        subprocess.CalledProcessError: A command failed. The other processes are killed.
    """
    try:
        while waiting := [each for each in contenders if not each.is_finished]:
            for contender in waiting:
                contender.run(seconds or None)
    finally:
        for contender in contenders:
            contender.kill()
