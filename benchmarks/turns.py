"""Processes that take turns on a machine, so that a change of its speed affects all of them alike.

Needs `setpriv`, which is part of util-linux.
"""

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import FrameType

_END_WITH_PARENT = ("setpriv", "--pdeathsig", "KILL", "--")
"""Lets the kernel kill the command that follows, also a stopped one, when its parent is killed."""


@dataclass
class Timed:
    """A process that has ended.

    Attributes:
        seconds: how long it ran, without the time in which it was stopped.
        lines: what it printed: seconds of running until then, and the line.
    """

    seconds: float
    lines: list[tuple[float, str]]


@dataclass
class _Process:
    """A process that was started.

    Attributes:
        popen: its handle.
        turns: when each of its turns began and ended, on the clock of `time.perf_counter`.
        printed: when each line was read, on this clock, and the line.
        reader: the thread that reads the lines.
    """

    popen: subprocess.Popen[str]
    turns: list[tuple[float, float]] = field(default_factory=list)
    printed: list[tuple[float, str]] = field(default_factory=list)
    reader: threading.Thread | None = None

    def read(self) -> None:
        for line in self.popen.stdout or ():
            self.printed.append((time.perf_counter(), line.rstrip("\n")))

    def ran_until(self, moment: float) -> float:
        """Seconds of running until a moment."""
        return sum(max(0.0, min(ended, moment) - began) for began, ended in self.turns)

    def timed(self) -> Timed:
        if self.reader is not None:
            self.reader.join()
        return Timed(self.ran_until(float("inf")), [(self.ran_until(moment), line) for moment, line in self.printed])


class Contender:
    """Commands that are run one after another, whenever it is their turn; between its turns the process is stopped.

    Args:
        name: name of the contender.
        commands: programs with their arguments.
        when_finished: called with the processes when all have ended.
    """

    def __init__(
        self,
        name: str,
        commands: Sequence[Sequence[str]],
        when_finished: Callable[[Sequence[Timed]], None] = lambda _: None,
    ) -> None:
        self.name = name
        self.ended: list[Timed] = []
        self._commands = list(commands)
        self._when_finished = when_finished
        self._process: _Process | None = None

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
            began = time.perf_counter()
            process = self._continue()
            try:
                process.popen.wait(None if ends is None else max(0.0, ends - time.perf_counter()))
            except subprocess.TimeoutExpired:
                os.killpg(process.popen.pid, signal.SIGSTOP)
                process.turns.append((began, time.perf_counter()))
                return
            process.turns.append((began, time.perf_counter()))
            self._process = None
            if process.popen.returncode:
                raise subprocess.CalledProcessError(process.popen.returncode, process.popen.args)
            self.ended.append(process.timed())
        self._when_finished(self.ended)

    def kill(self) -> None:
        """Ends the process that is running or stopped, if there is one."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.popen.pid, signal.SIGKILL)
            self._process.popen.wait()

    def _continue(self) -> _Process:
        if self._process is not None:
            os.killpg(self._process.popen.pid, signal.SIGCONT)
            return self._process
        self._process = _Process(
            subprocess.Popen(
                [*_END_WITH_PARENT, *self._commands[len(self.ended)]],
                stdout=subprocess.PIPE,
                text=True,
                errors="replace",
                env=os.environ | {"PYTHONUNBUFFERED": "1"},
                start_new_session=True,  # signals reach its children as well
            )
        )
        self._process.reader = threading.Thread(target=self._process.read, daemon=True)
        self._process.reader.start()
        return self._process


def take_turns(contenders: Sequence[Contender], seconds: float) -> None:
    """Runs all contenders to their ends.

    Args:
        contenders: they keep their memory between their turns, so all must fit into memory together.
        seconds: length of a turn; 0 runs each contender to its end before the next one.

    Raises:
        subprocess.CalledProcessError: A command failed. The other processes are killed.
    """
    with _signals_as_exceptions():
        try:
            while waiting := [each for each in contenders if not each.is_finished]:
                for contender in waiting:
                    contender.run(seconds or None)
        finally:
            for contender in contenders:
                contender.kill()


@contextlib.contextmanager
def _signals_as_exceptions() -> Iterator[None]:
    """Makes SIGTERM and SIGHUP raise SystemExit, as SIGINT raises KeyboardInterrupt, so that processes are ended."""

    def leave(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
