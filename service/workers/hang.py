"""Distinguishes a worker that hangs from one that gets little CPU time on a busy machine.

A worker sends a heartbeat twice a second from its event loop. Silence alone proves nothing: where other programs use
all CPUs, the worker may wait for its turn. Therefore silence counts as a hang soon only if the kernel shows that the
worker is stopped, or that it neither computes nor waits for a CPU or a disk.

Source: manual page proc_pid_stat(5).
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# Stopped by a signal or a debugger.
STOPPED_SECONDS = 1.5
# Alive and idle, although its event loop should send heartbeats.
IDLE_SECONDS = 3.0
# Still computing, waiting for a CPU or for a disk.
BUSY_SECONDS = 30.0
# Starting: importing and loading the model keep the event loop from running. Only idleness is a sign then.
START_IDLE_SECONDS = 60.0
CHECK_SECONDS = 0.25
# An idle process with many threads is woken now and then.
_IDLE_SHARE = 0.05
_WAITING_SHARE = 0.2
_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Activity:
    """What the kernel reports about a process.

    Attributes:
        stopped: Whether it is stopped by a signal or a debugger.
        waiting: Whether at least one thread is ready to run, or waits for a disk.
        cpu_seconds: CPU time that its threads have used in total.
    """

    stopped: bool
    waiting: bool
    cpu_seconds: float


def read_activity(pid: int) -> Activity | None:
    """The activity of a process, or None if it cannot be read: it has ended, or no file descriptor is free."""
    try:
        state, cpu_seconds = _read_stat(Path(f"/proc/{pid}/stat"))
        states = {_read_stat(folder / "stat")[0] for folder in Path(f"/proc/{pid}/task").iterdir()}
    except OSError:
        return None
    return Activity(state in "Tt", bool(states & {"R", "D"}), cpu_seconds)


def _read_stat(path: Path) -> tuple[str, float]:
    # The name of the program is in parentheses and may itself contain any characters.
    fields = path.read_text(errors="replace").rpartition(")")[2].split()
    return fields[0], (int(fields[11]) + int(fields[12])) / _TICKS_PER_SECOND


class HangDetector:
    """Decides whether one worker hangs.

    The time of silence is the sum of the times between checks. A late check adds at most two check intervals, because
    the supervisor itself may have been suspended or got no CPU, or the whole machine may have been asleep.

    Args:
        read: Reads the worker's activity.
        clock: Returns seconds and never goes backwards.
    """

    def __init__(self, read: Callable[[], Activity | None], clock: Callable[[], float] = time.monotonic) -> None:
        self._read, self._clock = read, clock
        self._ready = False
        self._last_check = clock()
        self._start_silence()

    def _start_silence(self) -> None:
        self._silence = 0.0
        self._stopped = 0.0
        self._before: Activity | None = None
        self._observed = 0
        self._waiting = 0
        self._cpu_seconds = 0.0

    def on_ready(self) -> None:
        """The worker serves: heartbeats are due from now on."""
        self._ready = True
        self._start_silence()

    def on_heartbeat(self) -> None:
        """A heartbeat arrived."""
        self._start_silence()

    def check(self) -> str | None:
        """The reason why the worker hangs, or None if it does not. Call it every CHECK_SECONDS."""
        now = self._clock()
        passed = min(now - self._last_check, 2 * CHECK_SECONDS)
        self._last_check = now
        self._silence += passed
        if self._silence < 2 * CHECK_SECONDS:
            return None
        activity = self._read()
        self._observe(activity, passed)
        if self._stopped >= STOPPED_SECONDS:
            return f"it has been stopped for {self._stopped:.1f} s"
        if not self._busy() and self._silence >= (IDLE_SECONDS if self._ready else START_IDLE_SECONDS):
            return f"it has been silent and idle for {self._silence:.1f} s"
        if self._ready and self._silence >= BUSY_SECONDS:
            return f"it has been silent for {self._silence:.1f} s"
        return None

    def _observe(self, activity: Activity | None, passed: float) -> None:
        self._observed += 1
        if activity is None or activity.waiting:
            self._waiting += 1
        if activity is None:
            return
        self._stopped = self._stopped + passed if activity.stopped else 0.0
        self._before = self._before or activity
        self._cpu_seconds = activity.cpu_seconds - self._before.cpu_seconds

    def _busy(self) -> bool:
        """Whether the worker computed during the silence, or often waited for a CPU or a disk.

        A thread that is seen ready to run once proves nothing: those of libraries wake up now and then.
        """
        return self._cpu_seconds > _IDLE_SHARE * self._silence or self._waiting > _WAITING_SHARE * self._observed
