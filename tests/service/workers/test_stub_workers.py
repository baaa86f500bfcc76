"""The supervisor with real processes that speak the workers' protocol, but fail on demand instead of serving."""

import asyncio
import os
import shutil
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from prometheus_client import generate_latest

from service.errors import StartError
from service.settings import parse
from service.workers import supervisor as supervisor_module
from service.workers.pipe import Kind, Message
from service.workers.process import STUCK_SECONDS, WorkerProcess
from service.workers.supervisor import FIRST_DELAY, LAST_DELAY, STABLE_SECONDS, Backoff, Supervisor
from tests.service.conftest import until
from tests.service.workers.test_supervisor import running

# It is given the arguments of a worker; `say` sends a message to the supervisor.
STUB = """#!{python}
import os, signal, subprocess, sys, time
settings, number, pipe, log, exports, supervisor = sys.argv[3:]
def say(message):
    os.write(int(pipe), message.encode() + b"\\n")
def serve():
    say("ready")
    while True:
        say("healthy")
        time.sleep(0.1)
{behaviour}
"""

Run = Callable[[str, Callable[[Supervisor], Awaitable[None]]], int]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Run:
    """Runs a supervisor of one worker with this behaviour until a coroutine has ended; returns the exit code."""

    def start(behaviour: str, during: Callable[[Supervisor], Awaitable[None]]) -> int:
        program = tmp_path / "worker"
        program.write_text(STUB.format(python=sys.executable, behaviour=behaviour))
        program.chmod(0o700)
        monkeypatch.setattr(sys, "executable", str(program))
        caplog.set_level("INFO")
        (tmp_path / "metrics").mkdir()
        supervisor = Supervisor(parse(["--grace", "0", "--port", "1"]), tmp_path / "metrics")

        async def supervise() -> int:
            async with asyncio.TaskGroup() as group:
                running = group.create_task(supervisor.run())
                await asyncio.wait_for(during(supervisor), 30)
                if not running.done():
                    os.kill(os.getpid(), signal.SIGTERM)
            return running.result()

        return asyncio.run(supervise())

    return start


async def logged(caplog: pytest.LogCaptureFixture, text: str, count: int = 1) -> None:
    while sum(text in message for message in caplog.messages) < count:
        await asyncio.sleep(0.02)


def test_a_worker_whose_engine_is_stuck_is_replaced(run, caplog, tmp_path):
    behaviour = f"""
if os.path.exists({str(tmp_path / "second")!r}):
    serve()
open({str(tmp_path / "second")!r}, "w")
say("ready")
say("healthy")
while True:
    say("stuck")
    time.sleep(0.1)
"""

    async def during(supervisor: Supervisor) -> None:
        await logged(caplog, "worker 1 is killed: its engine does not return from a batch")
        await logged(caplog, "worker 1 ended: signal SIGKILL; another starts in 0.1 s")
        await logged(caplog, "all 1 workers serve")
        metrics = generate_latest(supervisor._registry).decode()
        assert 'cifar_service_worker_failures_total{reason="stuck"} 1.0' in metrics

    run(behaviour, during)


def test_a_worker_that_sends_no_heartbeats_and_does_nothing_is_replaced(run, caplog):
    async def during(supervisor: Supervisor) -> None:
        began = time.monotonic()
        await logged(caplog, "worker 1 is killed: it has been silent and idle for")
        assert time.monotonic() - began < 10

    run('say("ready")\ntime.sleep(60)', during)


def test_a_worker_that_computes_without_heartbeats_is_left_alone_for_longer(run, caplog):
    behaviour = 'say("ready")\nend = time.monotonic() + 4\nwhile time.monotonic() < end: pass\nserve()'

    async def during(supervisor: Supervisor) -> None:
        await asyncio.sleep(5)

    run(behaviour, during)
    assert not any("killed:" in message for message in caplog.messages)


def test_processes_that_a_worker_left_behind_are_ended_with_it(run, caplog, tmp_path):
    behaviour = f"""
child = subprocess.Popen(["sleep", "60"])
say("ready")
with open({str(tmp_path / "child")!r}, "w") as file: file.write(str(child.pid))
os.kill(os.getpid(), signal.SIGKILL)
"""

    async def during(supervisor: Supervisor) -> None:
        await logged(caplog, "worker 1 ended: signal SIGKILL")

    run(behaviour, during)
    left = int((tmp_path / "child").read_text())
    until(lambda: not running(left), 5)


def test_loading_time_is_no_proof_of_health(run, caplog, monkeypatch):
    monkeypatch.setattr(supervisor_module, "STABLE_SECONDS", 0.5)

    async def during(supervisor: Supervisor) -> None:
        await logged(caplog, "worker 1 ended: exit code 3; another starts in 0.4 s")

    run('time.sleep(0.7)\nsay("ready")\nsys.exit(3)', during)


def test_a_worker_that_served_for_long_enough_is_replaced_after_the_first_pause_again(run, caplog, monkeypatch):
    monkeypatch.setattr(supervisor_module, "STABLE_SECONDS", 0.2)

    async def during(supervisor: Supervisor) -> None:
        await logged(caplog, "worker 1 ended: exit code 3; another starts in 0.1 s", count=3)

    run('say("ready")\ntime.sleep(0.5)\nsys.exit(3)', during)


def test_pauses_double_up_to_a_limit():
    backoff = Backoff()
    assert [backoff.delay(0.0) for _ in range(3)] == [FIRST_DELAY, 2 * FIRST_DELAY, 4 * FIRST_DELAY]
    assert [backoff.delay(STABLE_SECONDS / 2) for _ in range(20)][-1] == LAST_DELAY
    assert backoff.delay(STABLE_SECONDS + 1) == FIRST_DELAY


def test_a_worker_that_ignores_sigterm_is_killed_after_its_grace_period(run, caplog, monkeypatch):
    monkeypatch.setattr(supervisor_module, "KILL_SECONDS", 0.5)

    async def during(supervisor: Supervisor) -> None:
        await logged(caplog, "all 1 workers serve")

    assert run("signal.signal(signal.SIGTERM, signal.SIG_IGN)\nserve()", during) == 1
    assert any("worker 1 has not ended 0.5 s after its grace period" in message for message in caplog.messages)


def test_a_first_start_that_the_system_refuses_is_an_error(run, monkeypatch):
    async def during(supervisor: Supervisor) -> None:
        await asyncio.sleep(30)

    monkeypatch.setattr(Path, "chmod", lambda path, mode: path.unlink())  # the program is missing
    with pytest.raises(BaseExceptionGroup) as caught:
        run("serve()", during)
    (error,) = caught.value.exceptions
    assert isinstance(error, StartError)
    assert str(error) == "the process cannot be started: No such file or directory"


def test_a_folder_of_metrics_that_somebody_removed_is_made_again(run, caplog, tmp_path):
    async def during(supervisor: Supervisor) -> None:
        await logged(caplog, "all 1 workers serve")
        shutil.rmtree(tmp_path / "metrics")
        os.kill(supervisor._workers[1].pid, signal.SIGKILL)
        await logged(caplog, "worker 1 ended: signal SIGKILL")
        until_made = time.monotonic() + 10
        while not (tmp_path / "metrics").is_dir():
            assert time.monotonic() < until_made
            await asyncio.sleep(0.02)

    run("serve()", during)


def test_a_worker_that_ended_unnoticed_before_a_signal_was_sent_to_it_is_taken_note_of(run):
    async def during(supervisor: Supervisor) -> None:
        while not supervisor._workers:
            await asyncio.sleep(0.01)
        (worker,) = supervisor._workers.values()
        # Blocks the event loop, so that the supervisor cannot notice the end.
        os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)
        supervisor._stop()  # as the first SIGTERM does; `run` sends that, and a second one would end this process
        assert await asyncio.wait_for(worker.ended, 20) == 0

    assert run("sys.exit(0)", during) == 0


def test_a_worker_whose_engine_returned_in_time_is_not_stuck():
    worker = object.__new__(WorkerProcess)  # without a process
    killed = []
    worker._hung, worker._stuck_at, worker.number = "", None, 1
    worker.kill = lambda: killed.append(True)
    worker._hang = SimpleNamespace(on_heartbeat=lambda: None, check=lambda: None)
    for kind in (Kind.STUCK, Kind.HEALTHY):
        worker._receiver = SimpleNamespace(receive=lambda kind=kind: [Message(kind)])
        worker._receive()
        worker._stuck_at = worker._stuck_at and worker._stuck_at - STUCK_SECONDS - 1  # as if time had passed
    worker.kill_if_hanging()
    assert not killed
