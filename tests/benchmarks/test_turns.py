import importlib.util
import itertools
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import DEFAULT_SIGINT, REPOSITORY, prepared

_SPEC = importlib.util.spec_from_file_location("benchmarks_turns", REPOSITORY / "benchmarks/turns.py")
turns = importlib.util.module_from_spec(_SPEC)
sys.modules[_SPEC.name] = turns  # dataclasses look their module up
_SPEC.loader.exec_module(turns)

TICKING = """
import sys, time
for number in range({ticks}):
    began = time.thread_time()
    while time.thread_time() - began < 0.1:
        pass
    with open({file!r}, "a") as file:
        file.write({name!r})
    print("tick", number)
"""


def ticking(name, file, ticks):
    """A process that writes its name to the file after every tenth of a second of computing."""
    program = TICKING.format(ticks=ticks, file=str(file), name=name)
    return turns.Contender(name, [[sys.executable, "-c", program]])


def test_contenders_run_one_at_a_time_and_only_running_is_counted(tmp_path):
    first, second = (ticking(name, tmp_path / "order", 6) for name in "ab")
    began = time.perf_counter()
    turns.take_turns([first, second], 0.25)
    whole = time.perf_counter() - began
    order = (tmp_path / "order").read_text()
    assert sorted(order) == sorted("a" * 6 + "b" * 6)
    changes = sum(left != right for left, right in itertools.pairwise(order))
    assert changes >= 3, order
    (one,), (other,) = first.ended, second.ended
    assert 0.8 * whole < one.seconds + other.seconds <= whole
    assert min(one.seconds, other.seconds) >= 0.6
    for timed in (one, other):
        ticks = [seconds for seconds, line in timed.lines if line.startswith("tick")]
        assert len(ticks) == 6
        assert ticks == sorted(ticks)
        assert ticks[-1] <= timed.seconds


def test_without_a_length_of_turns_each_contender_runs_to_its_end(tmp_path):
    turns.take_turns([ticking(name, tmp_path / "order", 3) for name in "ab"], 0)
    assert (tmp_path / "order").read_text() == "aaabbb"


def test_the_commands_of_a_contender_follow_one_another_and_are_timed_apart(tmp_path):
    commands = [[sys.executable, "-c", f"print({number})"] for number in range(2)]
    contender = turns.Contender("both", commands)
    turns.take_turns([contender], 5)
    assert [[line for _, line in timed.lines] for timed in contender.ended] == [["0"], ["1"]]


def test_a_command_that_fails_is_an_error_and_stopped_processes_are_killed(tmp_path):
    stopped = ticking("a", tmp_path / "order", 1000)
    failing = turns.Contender("failing", [[sys.executable, "-c", "raise SystemExit(3)"]])
    with pytest.raises(subprocess.CalledProcessError, match="exit status 3"):
        turns.take_turns([stopped, failing], 0.3)
    written = (tmp_path / "order").stat().st_size if (tmp_path / "order").exists() else 0
    time.sleep(0.3)
    assert not (tmp_path / "order").exists() or (tmp_path / "order").stat().st_size == written
    assert stopped._process.popen.returncode == -9


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGKILL])
def test_no_process_is_left_behind_when_the_measurement_is_ended(tmp_path, number):
    program = f"""
import sys
sys.path.insert(0, {str(REPOSITORY / "benchmarks")!r})
from turns import Contender, take_turns
waiting = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(60)"
take_turns([Contender(name, [[sys.executable, "-c", waiting, {str(tmp_path)!r} + "/" + name]]) for name in "ab"], 0.5)
"""
    measuring = subprocess.Popen(
        prepared(DEFAULT_SIGINT, [sys.executable, "-c", program]),
        stderr=subprocess.DEVNULL,
    )
    files = [tmp_path / name for name in "ab"]
    try:
        wait_until(lambda: all(file.exists() and file.read_text() for file in files))
        measuring.send_signal(number)
        measuring.wait(20)
    finally:
        measuring.kill()
    identities = [int(file.read_text()) for file in files]
    wait_until(lambda: not any(is_alive(identity) for identity in identities))


def test_a_line_counts_the_running_time_until_it_was_read():
    process = turns._Process(popen=None, turns=[(10, 12), (20, 21), (30, 35)])
    assert [process.ran_until(moment) for moment in (9, 11, 12, 15, 20.5, 25, 31, 99)] == [0, 1, 2, 2, 2.5, 3, 4, 8]


def wait_until(condition):
    ends = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.05)


def is_alive(identity):
    status = Path(f"/proc/{identity}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"
