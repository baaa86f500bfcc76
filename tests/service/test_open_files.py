import subprocess
import sys

PROGRAM = """
import logging, resource, sys
from service.open_files import allow_connections
logging.basicConfig(format="%(message)s")
soft, hard, connections = map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
allow_connections(connections)
print(*resource.getrlimit(resource.RLIMIT_NOFILE))
"""


def limits_after(soft: int, hard: int, connections: int) -> tuple[str, str]:
    arguments = [sys.executable, "-c", PROGRAM, *map(str, (soft, hard, connections))]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    return done.stdout.strip(), done.stderr


def test_a_low_soft_limit_is_raised_as_far_as_the_connections_need():
    assert limits_after(256, 4000, 1000) == ("1200 4000", "")


def test_a_soft_limit_that_is_high_enough_stays():
    assert limits_after(3000, 4000, 1000) == ("3000 4000", "")


def test_a_hard_limit_that_is_too_low_is_named_together_with_the_way_out():
    limits, log = limits_after(256, 1024, 1000)
    assert limits == "1024 1024"
    assert "1000 connections (--max-connections) need 1200 open files" in log
    assert "is 1024" in log
    assert "LimitNOFILE" in log
