"""Files in which workers keep their metrics, one set for each process id.

The values of ended workers are combined in one further set, and their files are removed: counters never go backwards,
and a scrape after a thousand restarts reads no more files than the first.

Format and names: `prometheus_client.multiprocess`, `prometheus_client.mmap_dict`.
"""

import logging
from collections.abc import Callable
from operator import add
from pathlib import Path

from prometheus_client.mmap_dict import MmapedDict

from service.core.statistics import read_values

logger = logging.getLogger(__name__)

# How the values of an ended worker are combined with those of earlier ones, by kind of metric.
_COMBINED: dict[str, Callable[[float, float], float]] = {"counter": add, "histogram": add, "gauge_max": max}
# Used in place of a process id in the names of the files that hold the sums.
_ENDED = "ended"


class MetricFiles:
    """Files of all workers of one supervisor.

    A scrape must not run at the same time as `remove`, so do both in the same thread.

    Args:
        folder: Folder to which the workers write their files.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ended: set[int] = set()

    def remove(self, pid: int) -> None:
        """Adds the values of an ended worker to the sums and removes its files.

        If that fails, for example because no file descriptor is free, it is tried again when another worker ends. Until
        then, scrapes read the files of this worker.
        """
        self._ended.add(pid)
        for each in sorted(self._ended):
            try:
                self._remove(each)
            except OSError as error:
                logger.warning("metrics of the ended process %d are not merged yet: %s", each, error)
            else:
                self._ended.discard(each)

    def _remove(self, pid: int) -> None:
        for path in self._folder.glob(f"gauge_live*_{pid}.db"):
            path.unlink()
        for kind, combine in _COMBINED.items():
            path = self._folder / f"{kind}_{pid}.db"
            if path.exists():
                _merge(path, self._folder / f"{kind}_{_ENDED}.db", combine)


def _merge(source: Path, sums: Path, combine: Callable[[float, float], float]) -> None:
    """Combines the values in one file with those in another, and removes the first."""
    values = dict(read_values(sums))
    for key, value in read_values(source):
        values[key] = combine(values[key], value) if key in values else value
    # While this file exists, service.core.statistics waits, because values may be missing.
    written = sums.with_suffix(".new")
    written.unlink(missing_ok=True)
    file = MmapedDict(str(written))  # type: ignore[no-untyped-call]
    try:
        for key, value in values.items():
            file.write_value(key, value, 0.0)  # type: ignore[no-untyped-call]
    finally:
        file.close()  # type: ignore[no-untyped-call]
    # Between the two steps the values of the source are missing; in the opposite order they would count twice.
    source.unlink()
    written.replace(sums)
