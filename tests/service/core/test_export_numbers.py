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
