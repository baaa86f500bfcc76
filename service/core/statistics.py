"""How requests to each version of the model spent their time, for the Open Inference Protocol and for Prometheus.

All requests that reach the model count, whatever their protocol. The values are Prometheus metrics. With several
workers these are in files that all workers can read, so each worker can answer for the whole server. Values of workers
that have ended stay; see service.workers.metric_files.
"""

import functools
import json
import logging
import os
import struct
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.mmap_dict import MmapedDict

logger = logging.getLogger(__name__)

# The names of the phases are those of the Open Inference Protocol's statistics.
SUCCESS, FAIL, QUEUE = "success", "fail", "queue"
COMPUTE_INPUT, COMPUTE_INFER, COMPUTE_OUTPUT = "compute_input", "compute_infer", "compute_output"
PHASES: Final = (SUCCESS, FAIL, QUEUE, COMPUTE_INPUT, COMPUTE_INFER, COMPUTE_OUTPUT)
# While the supervisor adds the values of an ended worker to the sums, they are in no file for a moment.
_ATTEMPTS = 50
_PAUSE_SECONDS = 0.002

_Value = tuple[str, dict[str, str], float]
"""Name of a sample, its labels, and its value."""


@dataclass(frozen=True)
class Duration:
    """How often something was done, and how many seconds it took in total."""

    count: int = 0
    seconds: float = 0.0

    @property
    def nanoseconds(self) -> int:
        """The total in nanoseconds."""
        return round(self.seconds * 1e9)


@dataclass(frozen=True)
class Statistics:
    """How the requests to one version of the model spent their time, in all workers since the server started.

    Attributes:
        phases: By name of the phase. `success` and `fail` last from the admission of a request to its answer.
        batches: Batches that the engine computed, by number of images.
        last_inference: When the last batch was computed, in seconds since 1970; 0 before the first.
    """

    phases: dict[str, Duration] = field(default_factory=lambda: dict.fromkeys(PHASES, Duration()))
    batches: dict[int, Duration] = field(default_factory=dict)
    last_inference: float = 0.0

    @property
    def images(self) -> int:
        """Number of images that the engine computed."""
        return sum(size * duration.count for size, duration in self.batches.items())

    @property
    def executions(self) -> int:
        """Number of batches that the engine computed."""
        return sum(duration.count for duration in self.batches.values())


class Recorder:
    """Counts the requests to one version of the model; see `ModelStatistics.recorder`."""

    def __init__(
        self, number: int, phases: tuple[Counter, Counter], batches: tuple[Counter, Counter], last_inference: Gauge
    ) -> None:
        # Finding a series by its labels takes longer than adding to it.
        self._phases = {phase: tuple(each.labels(number, phase) for each in phases) for phase in PHASES}
        self._batch = functools.cache(lambda images: tuple(each.labels(number, images) for each in batches))
        self._last_inference = last_inference.labels(number)

    def add(self, phase: str, seconds: float, count: int = 1) -> None:
        """Adds the time that `count` requests spent in a phase, in total."""
        number, duration = self._phases[phase]
        number.inc(count)
        duration.inc(max(0.0, seconds))

    def add_batch(self, images: int, queued_seconds: Sequence[float], seconds: float) -> None:
        """Adds a batch that the engine computed.

        Args:
            images: Number of images.
            queued_seconds: How long each request waited whose first images it holds.
            seconds: How long the engine took.
        """
        if queued_seconds:
            self.add(QUEUE, sum(queued_seconds), len(queued_seconds))
            self.add(COMPUTE_INFER, seconds * len(queued_seconds), len(queued_seconds))
        count, duration = self._batch(images)
        count.inc()
        duration.inc(seconds)
        self._last_inference.set(time.time())


class ModelStatistics:
    """The statistics of all versions.

    Args:
        prefix: First part of the names of the metrics.
        registry: Where the metrics are registered.
    """

    def __init__(self, prefix: str, registry: CollectorRegistry) -> None:
        def counter(name: str, meaning: str, *labels: str) -> Counter:
            return Counter(f"{prefix}_{name}", meaning, ("number", *labels), registry=registry)

        self._phases = (
            counter("model_requests", "Requests to a version of the model, by phase that they passed.", "phase"),
            counter("model_request_seconds", "Seconds that these requests spent in the phase.", "phase"),
        )
        self._batches = (
            counter("model_batches", "Batches that the engine computed, by number of images.", "images"),
            counter("model_batch_seconds", "Seconds that the engine took for these batches.", "images"),
        )
        self._last = Gauge(
            f"{prefix}_model_last_inference_timestamp_seconds",
            "When a version of the model last computed a batch.",
            ("number",),
            registry=registry,
            multiprocess_mode="max",
        )
        self._prefix = f"{prefix}_model_"

    def recorder(self, number: int) -> Recorder:
        """Counts the requests to the version with this number."""
        return Recorder(number, self._phases, self._batches, self._last)

    def read(self, number: int) -> Statistics:
        """The statistics of one version, in all workers. Reads files if there are several workers."""
        folder = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
        values = _values_of_all_workers(Path(folder)) if folder else self._own_values()
        phases: dict[tuple[str, str], float] = {}
        batches: dict[tuple[str, int], float] = {}
        last = 0.0
        for name, labels, value in values:
            if not name.startswith(self._prefix) or labels.get("number") != str(number):
                continue
            name = name.removeprefix(self._prefix)
            if "phase" in labels:
                key = name, labels["phase"]
                phases[key] = phases.get(key, 0.0) + value
            elif "images" in labels:
                size = name, int(labels["images"])
                batches[size] = batches.get(size, 0.0) + value
            elif name == "last_inference_timestamp_seconds":
                last = max(last, value)
        # Requests pass the phases one after another, also while the values are read. perf_analyzer ends if their counts
        # differ, so what counts is how many requests have passed them all.
        counts = {phase: int(phases.get(("requests_total", phase), 0)) for phase in (SUCCESS, FAIL)}
        return Statistics(
            {
                phase: Duration(counts.get(phase, counts[SUCCESS]), phases.get(("request_seconds_total", phase), 0.0))
                for phase in PHASES
            },
            {
                size: Duration(int(count), batches.get(("batch_seconds_total", size), 0.0))
                for (name, size), count in sorted(batches.items())
                if name == "batches_total" and count
            },
            last,
        )

    def _own_values(self) -> Iterator[_Value]:
        for metric in (*self._phases, *self._batches, self._last):
            for family in metric.collect():
                for sample in family.samples:
                    yield sample.name, sample.labels, sample.value


def read_values(path: Path) -> list[tuple[str, float]]:
    """The keys and values in a file of metrics of one process; none if the file is damaged or does not exist.

    A key is JSON: name of the metric, name of the sample, labels, help text.
    """
    try:
        return [(key, value) for key, value, *_ in MmapedDict.read_all_values_from_file(str(path))]  # type: ignore[no-untyped-call]
    except FileNotFoundError:
        return []
    except (struct.error, RuntimeError, UnicodeDecodeError) as error:
        # The worker was killed while it created the file.
        logger.warning("metrics file %s is damaged and left out: %s", path.name, error)
        return []


def _values_of_all_workers(folder: Path) -> list[_Value]:
    """The values in the files of all workers. Each value is in exactly one of the files that are read."""
    for _ in range(_ATTEMPTS):
        before = _listing(folder)
        values = _read_all(path for path, _ in before if path.suffix == ".db")
        if _listing(folder) == before and not any(path.suffix == ".new" for path, _ in before):
            break
        time.sleep(_PAUSE_SECONDS)
    return values


def _read_all(paths: Iterable[Path]) -> list[_Value]:
    values = []
    for path in paths:
        for key, value in read_values(path):
            _, name, labels, _ = json.loads(key)
            values.append((name, labels, value))
    return values


def _listing(folder: Path) -> list[tuple[Path, int]]:
    """The files that may hold statistics, with their inodes."""
    listed = []
    for pattern in ("counter_*", "gauge_max_*"):
        for path in folder.glob(pattern):
            try:
                listed.append((path, path.stat().st_ino))
            except FileNotFoundError:  # it was merged a moment ago
                listed.append((path, 0))
    return sorted(listed)
