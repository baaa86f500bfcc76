import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import prepared

PROGRAM = """
import sys
from cifar_core.errors import run_command

def main():
    {}
    return 3

run_command(main)
"""


def start(body, **options):
    return subprocess.Popen(command(body), stderr=subprocess.PIPE, text=True, **options)


def command(body):
    return [sys.executable, "-c", PROGRAM.format(body)]


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_ends_first_ends_a_command_with_1_and_without_a_traceback(unbuffered):
    body = "sys.stdin.readline(); print('a'); print('b')"
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    with start(body, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as process:
        process.stdout.close()
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stderr.read() == ""
    assert process.returncode == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize(
    ("body", "what"),
    [
        ("print('x')", "the output or a file"),
        ("import errno; raise OSError(errno.ENOSPC, 'No space left on device', 'a.pt')", "a.pt"),
    ],
)
def test_a_full_disk_is_one_line(body, what):
    with Path("/dev/full").open("w") as full, start(body, stdout=full) as process:
        assert process.stderr.read() == f"error: {what} cannot be written: No space left on device; free some space\n"
    assert process.returncode == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize(
    "body", ["print('x')", "from cifar_core.errors import CifarError; raise CifarError('a fault')"]
)
def test_the_exit_code_is_2_if_standard_error_is_on_the_full_disk_too(body):
    with Path("/dev/full").open("w") as full:  # the usual `command > log 2>&1`
        done = subprocess.run(command(body), stdout=full, stderr=full, check=False)
    assert done.returncode == 2


def test_another_broken_pipe_is_an_error():
    with start("raise BrokenPipeError('of a socket')", stdout=subprocess.PIPE) as process:
        assert "BrokenPipeError: of a socket" in process.stderr.read()
    assert process.returncode == 1


def test_a_command_runs_with_a_closed_standard_output():
    closed = prepared("os.close(1)", command("print('x')"))
    done = subprocess.run(closed, stderr=subprocess.PIPE, text=True, check=False)
    assert done.stderr == ""
    assert done.returncode == 3


def test_a_file_that_cannot_be_opened_is_one_line_that_names_it(tmp_path):
    with start(f"open({str(tmp_path / 'missing')!r})") as process:
        said = process.stderr.read()
    assert said == f"error: {tmp_path / 'missing'}: No such file or directory; check the path and its permissions\n"
    assert process.returncode == 2


def test_a_character_that_the_terminal_does_not_have_is_written_as_its_number():
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    with start("print('caf\u00e9')", stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout.read() == "caf\\xe9\n"
        assert process.stderr.read() == ""
