"""Memory and processor time of a process and of all that it has started, as Linux counts them."""

from contextlib import suppress
from pathlib import Path

import psutil


def process_tree(pid: int) -> list[psutil.Process]:
    """A process and all its descendants that are alive; empty if it has ended."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    return []


def memory(pid: int) -> float:
    """Memory of a process tree in MiB (PSS: a page that several processes share is counted once)."""
    kibibytes = 0
    for process in process_tree(pid):
        with suppress(OSError):
            for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    kibibytes += int(line.split()[1])
    return kibibytes / 1024


def cpu_seconds(pid: int) -> float:
    """Processor time of a process tree in seconds, including processes that have ended and were waited for."""
    total = 0.0
    for process in process_tree(pid):
        with suppress(psutil.Error):
            times = process.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total
