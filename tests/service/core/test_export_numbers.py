import fcntl
import hashlib
import os
import subprocess
import sys

from service.core.export_numbers import ExportNumbers, create_list
from tests.conftest import REPOSITORY

# A process that inherits the list, as a worker does, and numbers exports.
PROCESS = """
import sys
from service.core.export_numbers import ExportNumbers
numbers = ExportNumbers(int(sys.argv[1]))
print(*(numbers.number_of(export) for export in sys.argv[2:]))
"""


def start(descriptor: int, *exports: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROCESS, str(descriptor), *exports]
    return subprocess.Popen(command, cwd=REPOSITORY, pass_fds=[descriptor], stdout=subprocess.PIPE, text=True)


def test_exports_are_numbered_in_their_order_and_keep_their_numbers():
    numbers = ExportNumbers()
    assert [numbers.number_of(export) for export in ("a", "b", "a", "c", "b")] == [1, 2, 1, 3, 2]
    assert ExportNumbers().number_of("b") == 1  # a list of its own


def test_processes_that_share_a_list_agree_however_they_race():
    descriptor = create_list()
    exports = [f"export-{number}" for number in range(20)]
    orders = [exports, exports[::-1], exports[10:] + exports[:10], exports[5:] + exports[:5]]
    processes = [start(descriptor, *order) for order in orders]
    seen = []
    for process, order in zip(processes, orders, strict=True):
        output, _ = process.communicate(timeout=60)
        seen.append(dict(zip(order, map(int, output.split()), strict=True)))
    assert all(numbers == seen[0] for numbers in seen)
    assert sorted(seen[0].values()) == list(range(1, 21))
    os.close(descriptor)


def test_a_record_that_a_killed_process_left_half_written_is_not_counted():
    descriptor = create_list()
    numbers = ExportNumbers(descriptor)
    assert numbers.number_of("a") == 1
    os.pwrite(descriptor, b"half", os.fstat(descriptor).st_size)
    assert (numbers.number_of("b"), numbers.number_of("a")) == (2, 1)
    os.close(descriptor)


# A process that says whether another one keeps all others from the list.
ASKING = """
import fcntl, sys
try:
    fcntl.lockf(int(sys.argv[1]), fcntl.LOCK_SH | fcntl.LOCK_NB)
    print("free")
except BlockingIOError:
    print("locked")
"""
# A process that says when it waits for the lock, and then the number of an export.
WAITING = """
import fcntl, signal, sys
from service.core.export_numbers import ExportNumbers
lockf = fcntl.lockf
def lock(*arguments):
    fcntl.lockf = lockf
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    lockf(*arguments)
fcntl.lockf = lock
signal.signal(signal.SIGALRM, lambda *_: print("waits", flush=True))
print(ExportNumbers(int(sys.argv[1])).number_of(sys.argv[2]))
"""


def state_of(descriptor: int) -> str:
    command = [sys.executable, "-I", "-S", "-c", ASKING, str(descriptor)]
    return subprocess.run(command, pass_fds=[descriptor], check=True, capture_output=True, text=True).stdout.strip()


def test_the_list_is_locked_for_other_processes_while_a_number_is_looked_up_and_added(monkeypatch):
    descriptor, seen = create_list(), []
    pread, pwrite = os.pread, os.pwrite
    monkeypatch.setattr(os, "pread", lambda *args: (seen.append(state_of(descriptor)), pread(*args))[1])
    monkeypatch.setattr(os, "pwrite", lambda *args: (seen.append(state_of(descriptor)), pwrite(*args))[1])
    assert ExportNumbers(descriptor).number_of("a") == 1
    assert seen == ["locked", "locked"]
    assert state_of(descriptor) == "free"
    os.close(descriptor)


def test_a_process_that_waits_for_the_lock_counts_what_the_other_has_added_meanwhile():
    descriptor = create_list()
    fcntl.lockf(descriptor, fcntl.LOCK_EX)
    command = [sys.executable, "-c", WAITING, str(descriptor), "a"]
    with subprocess.Popen(command, cwd=REPOSITORY, pass_fds=[descriptor], stdout=subprocess.PIPE, text=True) as waiting:
        assert waiting.stdout.readline() == "waits\n"
        os.pwrite(descriptor, hashlib.sha256(b"b").digest(), 0)
        fcntl.lockf(descriptor, fcntl.LOCK_UN)
        assert waiting.stdout.read() == "2\n"
    os.close(descriptor)
