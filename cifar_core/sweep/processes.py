"""Runs of a sweep as child processes: one run, and several at a time on this machine."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from cifar_core.run_folder import RunFolder, RunInUse

LOG = "train.log"
"""Output of the training process, in the run folder."""
# How often a run whose process was killed, for example for lack of memory, is continued before it counts as failed.
_RESTARTS = 3
# A process that was killed together with its node may need some time until it has released its run folder.
_LOCK_SECONDS = 60.0
_POLL_SECONDS = 0.5
_STOP_SECONDS = 60.0


@dataclass(frozen=True)
class Command:
    """How to train one run.

    Attributes:
        arguments: Arguments of `cifar_core.train`.
        folder: The run folder, absolute.
        working_folder: Folder that relative paths in the arguments start from, absolute.
        threads: Number of threads that PyTorch computes with.
    """

    arguments: tuple[str, ...]
    folder: Path
    working_folder: Path
    threads: int


class Children:
    """The training processes of this process, which can be stopped together."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._stopped = False

    def train(self, command: Command) -> int:
        """Trains a run to its end; continues it if its process is killed.

        Returns:
            The exit code of the process: 0 for a finished run; negative for a signal that killed it.
        """
        code = 0
        for _ in range(1 + _RESTARTS):
            _wait_until_unlocked(RunFolder(command.folder))
            code = self._run(command)
            if code >= 0 or self._stopped:
                break
        return code

    def stop(self) -> None:
        """Sends SIGTERM to all processes, so that they save their state, and waits until they have ended."""
        with self._lock:
            self._stopped = True
            running = list(self._running)
        for process in running:
            process.send_signal(signal.SIGTERM)
        for process in running:
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()

    def _run(self, command: Command) -> int:
        with (command.folder / LOG).open("ab") as log:
            with self._lock:
                if self._stopped:
                    return 128 + signal.SIGTERM
                process = subprocess.Popen(  # noqa: S603 -- our own program; the arguments are checked there
                    [sys.executable, "-m", "cifar_core.sweep.child", *command.arguments],
                    cwd=command.working_folder,
                    env={**os.environ, "OMP_NUM_THREADS": str(command.threads)},
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    # Ctrl-C in a terminal would reach this process as well, and a second signal ends it at once.
                    start_new_session=True,
                )
                self._running.add(process)
            with process:
                code = process.wait()
        with self._lock:
            self._running.remove(process)
        return code


def train_here(commands: Sequence[Command], jobs: int) -> Iterator[tuple[Command, int]]:
    """Trains runs on this machine, `jobs` at a time; yields each with its exit code when it has ended.

    If the caller is interrupted meanwhile, the runs are stopped, and their state is saved.
    """
    children = Children()
    with ThreadPoolExecutor(jobs, thread_name_prefix="run") as executor:
        running = {executor.submit(children.train, command): command for command in commands}
        try:
            for future in as_completed(running):
                yield running[future], future.result()
        finally:
            executor.shutdown(wait=False, cancel_futures=True)
            children.stop()


def last_line(folder: Path) -> str:
    """The last line that the training process of a run printed."""
    with contextlib.suppress(OSError):
        lines = (folder / LOG).read_text(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")
    return ""


def _wait_until_unlocked(folder: RunFolder) -> None:
    end = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            with folder.lock():
                return
        except RunInUse:
            if time.monotonic() > end:
                return  # the training process says what is wrong
            time.sleep(_POLL_SECONDS)
