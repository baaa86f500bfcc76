"""Metrics of the server for Prometheus.

This module does not know gRPC: methods and status codes are strings here. With several workers, each worker writes its
values to files in the folder PROMETHEUS_MULTIPROC_DIR, which the supervisor sets and reads; names and meanings stay the
same.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
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

from service.core.statistics import ModelStatistics

PREFIX: Final = "cifar_service"
# Otherwise each counter and histogram has one more series, which holds the time of its creation.
disable_created_metrics()  # type: ignore[no-untyped-call]
SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class Metrics:
    """All metrics of one process. The metrics page shows `registry`."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.statistics = ModelStatistics(PREFIX, self.registry)
        self.recorder = self.statistics.recorder(1)
        self._served: tuple[str, ...] | None = None
        counter, gauge, histogram = self._counter, self._gauge, self._histogram
        self._requests = counter("requests", "Answered requests, by method and status code.", "method", "code")
        self._seconds = histogram(
            "request_seconds", "Seconds from the arrival of a request to its answer.", SECONDS, "method"
        )
        self.in_flight = gauge("requests_in_flight", "Requests that wait for their answer.")
        self._images = counter("images", "Images in requests, by outcome.", "outcome")
        self._batch_images = histogram("batch_images", "Images in a batch given to the engine.", SIZES)
        self._queue_seconds = histogram("queue_seconds", "Seconds that a request waited for the engine.", SECONDS)
        self._inference_seconds = histogram("inference_seconds", "Seconds that the engine took for a batch.", SECONDS)
        self._engine_images = counter("engine_images", "Images that the engine computed.")
        self._engine_failures = counter("engine_failures", "Batches that the engine failed to compute.")
        self.waiting = gauge("waiting_images", "Images that wait for the engine.")
        self.admitted = gauge(
            "admitted_images", "Images in the server: those being decoded, those waiting and those being computed."
        )
        self._rejected = counter("rejected", "Requests refused because the server was full.")
        self._given_up = {
            "DEADLINE_EXCEEDED": counter("expired", "Requests whose deadline passed before their answer was ready."),
            "CANCELLED": counter("cancelled", "Requests that their client cancelled."),
        }
        self._spared = counter(
            "spared_images",
            "Images of expired and cancelled requests that were dropped before the engine computed them.",
        )
        self._receive_timeouts = counter(
            "receive_timeouts", "Requests refused because the client took too long to send them."
        )
        self._decoder_restarts = counter(
            "decoder_restarts",
            "Decoding processes that were replaced: 'limit' exceeded its time or memory, 'crash' ended by itself.",
            "reason",
        )
        self._reloads = counter("model_reloads", "New exports that were found, by outcome.", "outcome")
        self._model = gauge(
            "model_info",
            "Processes that serve this model; 0 for a model that was replaced.",
            "number",
            "version",
            "variant",
            "device",
            "sha256",
        )
        # A series with labels exists only after its first use; these exist from the start, with the value 0.
        self._classified, self._not_classified = (self._images.labels(each) for each in ("classified", "rejected"))
        for outcome in ("served", "refused"):
            self._reloads.labels(outcome)
        for reason in ("limit", "crash"):
            self._decoder_restarts.labels(reason)

        # Finding a series by its labels takes longer than adding to it.
        self._series_of_request = functools.cache(
            lambda method, code: (self._requests.labels(method, code), self._seconds.labels(method))
        )

    def _counter(self, name: str, meaning: str, *labels: str) -> Counter:
        return Counter(f"{PREFIX}_{name}", meaning, labels, registry=self.registry)

    def _gauge(self, name: str, meaning: str, *labels: str) -> Gauge:
        return Gauge(f"{PREFIX}_{name}", meaning, labels, registry=self.registry, multiprocess_mode="livesum")

    def _histogram(self, name: str, meaning: str, buckets: Sequence[float], *labels: str) -> Histogram:
        return Histogram(f"{PREFIX}_{name}", meaning, labels, buckets=buckets, registry=self.registry)

    # Requests

    def on_request(self, method: str, code: str, seconds: float) -> None:
        """Counts a request that is over; `code` is the name of a gRPC status code."""
        count, duration = self._series_of_request(method, code)
        count.inc()
        duration.observe(seconds)
        if code in self._given_up:
            self._given_up[code].inc()

    def on_images(self, classified: int, rejected: int) -> None:
        """Counts the images of a request: those that were classified and those that got an error of their own."""
        if classified:
            self._classified.inc(classified)
        if rejected:
            self._not_classified.inc(rejected)

    def on_receive_timeout(self) -> None:
        """Counts a request that was refused because its client took too long to send it."""
        self._receive_timeouts.inc()

    def on_decoder_ended(self, reason: str) -> None:
        """Counts a replaced decoding process: "limit" if it exceeded a limit, "crash" if it ended by itself."""
        self._decoder_restarts.labels(reason).inc()

    # Batches (service.core.batcher.Observer)

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
        self.recorder.add_batch(images, queued_seconds, seconds)

    def on_rejected(self, images: int) -> None:
        """See service.core.batcher.Observer."""
        self._rejected.inc()

    def on_dropped(self, images: int) -> None:
        """See service.core.batcher.Observer."""
        self._spared.inc(images)

    # Models

    def on_model(self, number: int, version: str, variant: str, device: str, sha256: str) -> None:
        """Records that this model is served from now on; see `Model` for the arguments."""
        if self._served is not None:
            self._model.labels(*self._served).set(0)
        self._served = (str(number), version, variant, device, sha256)
        self._model.labels(*self._served).set(1)
        self.recorder = self.statistics.recorder(number)

    def on_reload(self, served: bool) -> None:
        """Counts a new export, which is served from now on or was refused."""
        self._reloads.labels("served" if served else "refused").inc()


class Processes(Collector):
    """CPU time, memory, open files and start time of processes: Prometheus' names with the additional label `process`.

    Args:
        pids: Returns the process ids by name of the process; called at every scrape.
    """

    def __init__(self, pids: Callable[[], Mapping[str, int]]) -> None:
        self._pids = pids

    def collect(self) -> Iterable[Metric]:
        """One metric family for each figure, with one sample for each process that exists."""
        merged: dict[str, Metric] = {}
        for name, pid in self._pids().items():
            for family in ProcessCollector(pid=functools.partial(int, pid), registry=None).collect():
                metric = merged.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                for sample in family.samples:
                    metric.add_sample(sample.name, {**sample.labels, "process": name}, sample.value)
        return merged.values()
