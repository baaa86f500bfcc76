"""Gives memory that was freed back to the operating system.

glibc keeps memory that was freed after a burst of large requests. A server that runs for months would stay at its peak.
"""

import asyncio
import ctypes
import os
from collections.abc import Callable
from pathlib import Path

_CHECK_SECONDS = 5.0
_IDLE_GROWTH = 8 * 2**20
_BUSY_GROWTH = 192 * 2**20


# Options of mallopt, from glibc's malloc.h.
_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8
# Blocks of this size go back to the operating system as soon as they are freed.
_RETURNED_BYTES = 2**18
# Fewer arenas leave fewer holes; a server of a few threads needs no more.
_ARENAS = 2


def limit_heap() -> None:
    """Makes glibc's malloc hold less freed memory. Call it before threads are started; elsewhere it does nothing."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, _RETURNED_BYTES)
        libc.mallopt(_M_ARENA_MAX, _ARENAS)


def resident_bytes() -> int:
    """The resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def trim_regularly(is_busy: Callable[[], bool]) -> None:
    """Trims the heap whenever the process has grown since the last time, until cancelled.

    Does nothing where the C library has no malloc_trim, such as musl or macOS.

    Args:
        is_busy: Returns whether requests are being answered. Then only large growth is worth the page faults that
            follow a trim.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "malloc_trim") or not Path("/proc/self/statm").exists():
        return
    at_start = after_trim = resident_bytes()
    while True:
        await asyncio.sleep(_CHECK_SECONDS)
        try:
            now = resident_bytes()
        except OSError:  # no free file descriptor: the next check may find one
            continue
        # While idle a trim costs a millisecond. What it could not free before may be free by now.
        if now - after_trim > _BUSY_GROWTH or (now - at_start > _IDLE_GROWTH and not is_busy()):
            await asyncio.to_thread(libc.malloc_trim, 0)
            after_trim = now  # what was freed shows in the next check
        after_trim = min(after_trim, now)
