"""What the server counts: for Prometheus, and for the Open Inference Protocol's statistics call.

Must never know gRPC: methods and status codes are strings here. With several workers each writes its numbers to files
in PROMETHEUS_MULTIPROC_DIR, which the supervisor sets and reads; names and meanings are the same.
"""

import functools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

PREFIX: Final = "cifar_service"
disable_created_metrics()  # type: ignore[no-untyped-call]  # the time when a counter began, as one more series of each
SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(slots=True)
class Duration:
    """How often something was done, and the nanoseconds in all."""

    count: int = 0
    nanoseconds: int = 0

    def add(self, seconds: float, count: int = 1) -> None:
        self.count += count
        self.nanoseconds += int(seconds * 1e9)


@dataclass(slots=True)
class Statistics:
    """Where the time of one model version's requests went, in this process."""

    success: Duration = field(default_factory=Duration)
    failure: Duration = field(default_factory=Duration)
    queue: Duration = field(default_factory=Duration)
    input: Duration = field(default_factory=Duration)
    inference: Duration = field(default_factory=Duration)
    output: Duration = field(default_factory=Duration)
    images: int = 0
    batches: dict[int, Duration] = field(default_factory=dict)
    last_inference: float = 0.0  # of time.time()


class Metrics:
    """Everything that is counted in one process. `registry` is what an HTTP server shows."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.statistics = Statistics()
        counter, gauge, histogram = self._counter, self._gauge, self._histogram
        self._requests = counter("requests", "Requests by method and status code.", "method", "code")
        self._seconds = histogram(
            "request_seconds", "Seconds from a request's arrival to its answer.", SECONDS, "method"
        )
        self.in_flight = gauge("requests_in_flight", "Requests that wait for their answer.")
        self._images = counter("images", "Images that were asked about, by outcome.", "outcome")
        self._batch_images = histogram("batch_images", "Images in a batch given to the engine.", SIZES)
        self._queue_seconds = histogram("queue_seconds", "Seconds that a request waited for the engine.", SECONDS)
        self._inference_seconds = histogram("inference_seconds", "Seconds that the engine took for a batch.", SECONDS)
        self._engine_images = counter("engine_images", "Images that the engine computed.")
        self._engine_failures = counter("engine_failures", "Batches that the engine failed on.")
        self.waiting = gauge("waiting_images", "Images that wait for the engine.")
        self.admitted = gauge("admitted_images", "Images in the server: being decoded, waiting or being computed.")
        self._rejected = counter("rejected", "Requests refused because the server held as many images as it may.")
        self._expired = counter("expired", "Requests whose deadline passed before their answer was there.")
        self._cancelled = counter("cancelled", "Requests that their client cancelled.")
        self._spared = counter("spared_images", "Images of expired and cancelled requests that the engine never saw.")
        self._reloads = counter("model_reloads", "New exports found, by outcome.", "outcome")
        self._served: tuple[str, str, str, str] | None = None
        self._model = gauge(
            "model_info",
            "Processes that serve this model; 0 for one that was replaced.",
            "version",
            "variant",
            "device",
            "sha256",
        )
        # With labels, a series begins to exist when it is first touched; these shall be there from the start, as zeros.
        self._classified, self._not_classified = (self._images.labels(each) for each in ("classified", "rejected"))
        for outcome in ("served", "refused"):
            self._reloads.labels(outcome)

        # Finding a series by its labels costs more than counting in it.
        self._requests_of = functools.cache(self._requests.labels)
        self._seconds_of = functools.cache(self._seconds.labels)

    def _counter(self, name: str, meaning: str, *labels: str) -> Counter:
        return Counter(f"{PREFIX}_{name}", meaning, labels, registry=self.registry)

    def _gauge(self, name: str, meaning: str, *labels: str) -> Gauge:
        return Gauge(f"{PREFIX}_{name}", meaning, labels, registry=self.registry, multiprocess_mode="livesum")

    def _histogram(self, name: str, meaning: str, buckets: Sequence[float], *labels: str) -> Histogram:
        return Histogram(f"{PREFIX}_{name}", meaning, labels, buckets=buckets, registry=self.registry)

    # Of requests

    def on_request(self, method: str, code: str, seconds: float) -> None:
        """A request was answered, with the name of a gRPC status code."""
        self._requests_of(method, code).inc()
        self._seconds_of(method).observe(seconds)

    def on_images(self, classified: int, rejected: int) -> None:
        """So many images of a request got classes, so many an error of their own."""
        if classified:
            self._classified.inc(classified)
        if rejected:
            self._not_classified.inc(rejected)

    # Of the batcher (service.core.batcher.Observer)

    def on_batch(self, images: int, queued_seconds: Sequence[float], seconds: float, failed: bool) -> None:
        """See service.core.batcher.Observer."""
        for queued in queued_seconds:
            self._queue_seconds.observe(queued)
        self._batch_images.observe(images)
        self._inference_seconds.observe(seconds)
        self._engine_images.inc(images)
        if failed:
            self._engine_failures.inc()
            return
        statistics = self.statistics
        statistics.queue.add(sum(queued_seconds), len(queued_seconds))
        statistics.inference.add(seconds * len(queued_seconds), len(queued_seconds))
        statistics.images += images
        statistics.batches.setdefault(images, Duration()).add(seconds)
        statistics.last_inference = time.time()

    def on_rejected(self, images: int) -> None:
        """See service.core.batcher.Observer."""
        self._rejected.inc()

    def on_expired(self, images: int) -> None:
        """See service.core.batcher.Observer."""
        self._expired.inc()
        self._spared.inc(images)

    def on_cancelled(self, images: int) -> None:
        """See service.core.batcher.Observer."""
        self._cancelled.inc()
        self._spared.inc(images)

    # Of models

    def on_model(self, version: str, variant: str, device: str, sha256: str) -> None:
        """This model is served from now on; its statistics begin anew."""
        if self._served is not None:
            self._model.labels(*self._served).set(0)
        self._served = (version, variant, device, sha256)
        self._model.labels(*self._served).set(1)
        self.statistics = Statistics()

    def on_reload(self, served: bool) -> None:
        """A new export was found, and taken or refused."""
        self._reloads.labels("served" if served else "refused").inc()


class Processes(Collector):
    """CPU, memory, open files and start of each process, as Prometheus names them, with the label `process`.

    Args:
        pids: Name and process id of each, asked for anew at every scrape.
    """

    def __init__(self, pids: Callable[[], Mapping[str, int]]) -> None:
        self._pids = pids

    def collect(self) -> Iterable[Metric]:
        """The figures of all processes."""
        merged: dict[str, Metric] = {}
        for name, pid in self._pids().items():
            for family in ProcessCollector(pid=functools.partial(int, pid), registry=None).collect():
                metric = merged.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                for sample in family.samples:
                    metric.add_sample(sample.name, {**sample.labels, "process": name}, sample.value)
        return merged.values()
