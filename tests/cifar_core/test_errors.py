import os
import subprocess
import sys

import pytest

PROGRAM = """
import sys
from cifar_core.errors import run_command

def main():
    {}
    return 3

run_command(main)
"""


def start(body, **options):
    command = [sys.executable, "-c", PROGRAM.format(body)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **options)


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


def test_another_broken_pipe_is_an_error():
    with start("raise BrokenPipeError('of a socket')", stdout=subprocess.PIPE) as process:
        assert "BrokenPipeError: of a socket" in process.stderr.read()
    assert process.returncode == 1


def test_a_command_runs_with_a_closed_standard_output():
    with start("print('x')", preexec_fn=lambda: os.close(1)) as process:
        assert process.stderr.read() == ""
    assert process.returncode == 3
