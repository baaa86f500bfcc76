"""A worker that hangs is distinguished from one that gets no CPU time because the machine is busy or asleep."""

import os
import signal
import subprocess
import sys
import time

import pytest

from service.workers import hang
from service.workers.hang import (
    BUSY_SECONDS,
    CHECK_SECONDS,
    IDLE_SECONDS,
    START_IDLE_SECONDS,
    STOPPED_SECONDS,
    Activity,
    HangDetector,
    read_activity,
)
from tests.service.conftest import until

IDLE = Activity(stopped=False, waiting=False, cpu_seconds=1.0)
STARVED = Activity(stopped=False, waiting=True, cpu_seconds=1.0)
STOPPED = Activity(stopped=True, waiting=False, cpu_seconds=1.0)


class Simulation:
    """A detector with a clock of its own; `activity` is what the kernel shows from now on."""

    def __init__(self) -> None:
        self.now = 100.0
        self.activity: Activity | None = IDLE
        self.detector = HangDetector(lambda: self.activity, lambda: self.now)

    def silence(self, limit: float, cpu_share: float = 0.0) -> float | None:
        """Seconds without a heartbeat until the detector reports a hang; None if it reports none."""
        began = self.now
        while self.now - began < limit:
            self.now += CHECK_SECONDS
            if self.activity is not None and cpu_share:
                used = self.activity.cpu_seconds + cpu_share * CHECK_SECONDS
                self.activity = Activity(self.activity.stopped, self.activity.waiting, used)
            if self.detector.check():
                return self.now - began
        return None


@pytest.fixture
def simulation() -> Simulation:
    ready = Simulation()
    ready.detector.on_ready()
    return ready


def test_a_stopped_worker_hangs_after_a_short_time(simulation):
    simulation.activity = STOPPED
    silent = simulation.silence(10)
    assert silent is not None
    assert STOPPED_SECONDS <= silent <= STOPPED_SECONDS + 1


def test_an_idle_worker_without_heartbeats_hangs_a_little_later(simulation):
    silent = simulation.silence(10)
    assert silent is not None
    assert IDLE_SECONDS <= silent <= IDLE_SECONDS + 1


def test_a_worker_that_waits_for_a_cpu_gets_much_longer(simulation):
    simulation.activity = STARVED
    silent = simulation.silence(100)
    assert silent is not None
    assert BUSY_SECONDS <= silent <= BUSY_SECONDS + 1


def test_a_worker_that_computes_without_heartbeats_gets_much_longer(simulation):
    silent = simulation.silence(100, cpu_share=0.5)
    assert silent is not None
    assert silent >= BUSY_SECONDS


def test_a_worker_whose_activity_cannot_be_read_gets_much_longer(simulation):
    simulation.activity = None
    silent = simulation.silence(100)
    assert silent is not None
    assert silent >= BUSY_SECONDS


def test_heartbeats_keep_a_worker_alive(simulation):
    simulation.activity = STARVED
    for _ in range(100):
        assert simulation.silence(STOPPED_SECONDS) is None
        simulation.detector.on_heartbeat()


def test_a_short_stop_is_no_hang(simulation):
    for _ in range(20):
        simulation.activity = STOPPED
        assert simulation.silence(STOPPED_SECONDS - 2 * CHECK_SECONDS) is None
        simulation.activity = STARVED
        assert simulation.silence(1) is None
        simulation.detector.on_heartbeat()


def test_a_supervisor_that_was_suspended_itself_does_not_blame_the_worker(simulation):
    for _ in range(3):
        simulation.now += 3600
        assert simulation.detector.check() is None
        simulation.detector.on_heartbeat()


def test_a_worker_that_loads_its_model_need_not_send_heartbeats():
    loading = Simulation()
    assert loading.silence(3600, cpu_share=1.0) is None
    silent = Simulation().silence(3600)
    assert silent is not None
    assert silent >= START_IDLE_SECONDS


def test_a_worker_that_is_stopped_while_it_starts_hangs():
    starting = Simulation()
    starting.activity = STOPPED
    assert starting.silence(10) is not None


def test_the_kernel_shows_what_a_real_process_does():
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as idle:
        try:
            until(lambda: (read_activity(idle.pid) or STARVED).waiting is False)
            os.kill(idle.pid, signal.SIGSTOP)
            until(lambda: (read_activity(idle.pid) or IDLE).stopped)
        finally:
            idle.kill()
    assert read_activity(idle.pid) is None
    before = read_activity(os.getpid())
    began = time.process_time()
    while time.process_time() - began < 0.2:
        pass
    after = read_activity(os.getpid())
    assert before is not None
    assert after is not None
    assert after.waiting
    assert after.cpu_seconds - before.cpu_seconds >= 0.1


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        ("SS", Activity(stopped=False, waiting=False, cpu_seconds=2.0)),
        ("SR", Activity(stopped=False, waiting=True, cpu_seconds=2.0)),
        ("SD", Activity(stopped=False, waiting=True, cpu_seconds=2.0)),  # waits for a disk
        ("TT", Activity(stopped=True, waiting=False, cpu_seconds=2.0)),
        ("tt", Activity(stopped=True, waiting=False, cpu_seconds=2.0)),  # stopped by a debugger
    ],
)
def test_the_states_of_all_threads_are_read(tmp_path, monkeypatch, states, expected):
    ticks = hang._TICKS_PER_SECOND
    for number, state in enumerate(states):
        for folder in (tmp_path / "proc/7", tmp_path / f"proc/7/task/{7 + number}"):
            folder.mkdir(parents=True, exist_ok=True)
            if number == 0 or "task" in str(folder):
                (folder / "stat").write_text(f"7 (a) b) {state} {'0 ' * 10}{ticks} {ticks} 0")
    monkeypatch.setattr(hang, "Path", lambda path: tmp_path / path.removeprefix("/"))
    assert read_activity(7) == expected


def test_a_thread_that_is_seen_ready_to_run_once_proves_nothing(simulation):
    simulation.activity = STARVED
    assert simulation.silence(2 * CHECK_SECONDS) is None  # one look at the worker
    simulation.activity = IDLE
    assert simulation.silence(IDLE_SECONDS) is not None
