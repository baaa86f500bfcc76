import importlib.util
import itertools
import subprocess
import sys
import time

import pytest

from tests.conftest import REPOSITORY

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
    assert stopped._process.returncode == -9
