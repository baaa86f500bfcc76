"""Gives memory that was freed back to the operating system.

glibc keeps what a burst of large requests has freed. A server that runs for months would stay at its peak.
"""

import asyncio
import ctypes
import os
from collections.abc import Callable
from pathlib import Path

_CHECK_SECONDS = 5.0
_IDLE_GROWTH = 8 * 2**20
_BUSY_GROWTH = 192 * 2**20


def resident_bytes() -> int:
    """The resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def trim_regularly(is_busy: Callable[[], bool]) -> None:
    """Trims the heap whenever the process has grown since the last time, until cancelled.

    Does nothing where the C library has no malloc_trim, such as musl or macOS.

    Args:
        is_busy: While requests are being answered, only large growth is worth the page faults that follow.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "malloc_trim") or not Path("/proc/self/statm").exists():
        return
    smallest = resident_bytes()
    while True:
        await asyncio.sleep(_CHECK_SECONDS)
        now = resident_bytes()
        if now - smallest > (_BUSY_GROWTH if is_busy() else _IDLE_GROWTH):
            await asyncio.to_thread(libc.malloc_trim, 0)
            now = resident_bytes()
            smallest = now
        smallest = min(smallest, now)
