"""Decoders for tests, and measurements of their processes."""

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from cifar_core.pixels import ImageLimits
from service.core.decoding import Decoder
from tests.cifar_core.image_corpus import gradient, saved

LIMITS = ImageLimits(max_bytes=10 * 2**20, max_pixels=32_000_000)
_SMALL = saved(gradient(32, 32))
_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE_MIB = os.sysconf("SC_PAGE_SIZE") / 2**20


@contextlib.asynccontextmanager
async def running(processes: int = 2, limits: ImageLimits = LIMITS, **options: object) -> AsyncIterator[Decoder]:
    decoder = Decoder(processes, limits, **options)
    try:
        await until(lambda: len(decoder.pids) >= processes)
        await decoder.decode([_SMALL] * 100)  # all processes have answered
        yield decoder
    finally:
        decoder.close()


async def until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition did not become true"
        await asyncio.sleep(0.005)


def cpu_seconds(pid: int) -> float:
    """CPU time of a process, 0 if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / _TICKS


def resident_mib(pid: int) -> float:
    """Resident memory of a process that it shares with no other, 0 if it has ended."""
    try:
        return sum(
            int(line.split()[1]) / 1024
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            if line.startswith(("Private_Clean", "Private_Dirty"))
        )
    except OSError:
        return 0.0


def seconds_waited_for_cpu(pid: int) -> float:
    """How long a process was ready to run while other processes ran; 0 if it has ended."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9
    except OSError:
        return 0.0


def niceness(pid: int) -> int:
    return os.getpriority(os.PRIO_PROCESS, pid)


class CpuMeter:
    """CPU time of all processes that a decoder ever had, and how long they and this process waited for a CPU."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._seconds: dict[int, float] = {}
        self._first = {pid: cpu_seconds(pid) for pid in decoder.pids}
        self._waited: dict[int, float] = {}
        self.peak_mib = 0.0

    async def __aenter__(self) -> "CpuMeter":
        self._task = asyncio.create_task(self._sample())
        return self

    async def __aexit__(self, *error: object) -> None:
        self._task.cancel()
        self._note()

    @property
    def seconds(self) -> float:
        return sum(value - self._first.get(pid, 0.0) for pid, value in self._seconds.items())

    @property
    def waited(self) -> float:
        self._note()
        return sum(self._waited.values())

    def _note(self) -> None:
        pids = self._decoder.pids
        for pid in (os.getpid(), *pids):
            self._waited[pid] = max(self._waited.get(pid, 0.0), seconds_waited_for_cpu(pid))
        for pid in pids:
            self._seconds[pid] = max(self._seconds.get(pid, 0.0), cpu_seconds(pid))
        self.peak_mib = max(self.peak_mib, sum(resident_mib(pid) for pid in pids))

    async def _sample(self) -> None:
        while True:
            self._note()
            await asyncio.sleep(0.005)
