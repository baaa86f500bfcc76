import os
import subprocess
import sys
import time

import pytest
from prometheus_client import generate_latest

from service.core.metrics import Metrics, Processes


def samples(metrics: Metrics) -> dict[str, float]:
    lines = generate_latest(metrics.registry).decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}


def test_requests_are_counted_by_method_and_code_with_their_time():
    metrics = Metrics()
    for code, seconds in (("OK", 0.004), ("OK", 0.03), ("INTERNAL", 0.2)):
        metrics.on_request("m", code, seconds)
    seen = samples(metrics)
    assert seen['cifar_service_requests_total{code="OK",method="m"}'] == 2
    assert seen['cifar_service_requests_total{code="INTERNAL",method="m"}'] == 1
    assert seen['cifar_service_request_seconds_count{method="m"}'] == 3
    assert seen['cifar_service_request_seconds_sum{method="m"}'] == pytest.approx(0.234)
    assert seen['cifar_service_request_seconds_bucket{le="0.005",method="m"}'] == 1


def test_series_that_alerts_use_exist_before_the_first_event():
    seen = samples(Metrics())
    for name in (
        "receive_timeouts_total",
        'decoder_restarts_total{reason="limit"}',
        'decoder_restarts_total{reason="crash"}',
        'images_total{outcome="classified"}',
        'images_total{outcome="rejected"}',
        'model_reloads_total{outcome="served"}',
        'model_reloads_total{outcome="refused"}',
        "rejected_total",
        "expired_total",
        "cancelled_total",
        "spared_images_total",
        "engine_failures_total",
        "waiting_images",
        "admitted_images",
        "requests_in_flight",
    ):
        assert seen[f"cifar_service_{name}"] == 0, name


def test_replaced_decoders_and_slow_senders_are_counted():
    metrics = Metrics()
    metrics.on_decoder_ended("limit")
    metrics.on_decoder_ended("limit")
    metrics.on_decoder_ended("crash")
    metrics.on_receive_timeout()
    seen = samples(metrics)
    assert seen['cifar_service_decoder_restarts_total{reason="limit"}'] == 2
    assert seen['cifar_service_decoder_restarts_total{reason="crash"}'] == 1
    assert seen["cifar_service_receive_timeouts_total"] == 1


def test_a_failed_batch_counts_as_a_failure_and_not_in_the_statistics_of_the_model():
    metrics = Metrics()
    metrics.on_batch(3, [0.1], 0.2, failed=True)
    metrics.on_batch(2, [0.1, 0.2], 0.5, failed=False)
    seen = samples(metrics)
    assert seen["cifar_service_engine_failures_total"] == 1
    assert seen["cifar_service_engine_images_total"] == 5
    statistics = metrics.statistics.read(1)
    assert statistics.images == 2
    assert statistics.batches[2].count == statistics.executions == 1
    assert statistics.phases["queue"].nanoseconds == 300_000_000


def test_each_version_of_the_model_has_statistics_of_its_own_which_go_on_when_it_is_served_again():
    metrics = Metrics()
    metrics.on_model(1, "a", "fp32", "cpu", "aa")
    metrics.on_batch(2, [0.1], 0.5, failed=False)
    metrics.on_model(2, "b", "fp32", "cpu", "bb")
    served = {name: value for name, value in samples(metrics).items() if name.startswith("cifar_service_model_info")}
    assert sorted(served.values()) == [0, 1]
    assert next(name for name, value in served.items() if value == 1).count('number="2",sha256="bb"') == 1
    assert metrics.statistics.read(2).images == 0
    assert metrics.statistics.read(2).last_inference == 0
    metrics.on_model(1, "a", "fp32", "cpu", "aa")
    metrics.on_batch(3, [0.1], 0.5, failed=False)
    statistics = metrics.statistics.read(1)
    assert {size: duration.count for size, duration in statistics.batches.items()} == {2: 1, 3: 1}
    assert statistics.images == 5
    assert abs(statistics.last_inference - time.time()) < 60


def test_metrics_of_processes_have_their_name_and_ended_processes_are_left_out():
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as child:
        metrics = Metrics()
        metrics.registry.register(Processes(lambda: {"server": os.getpid(), "other": child.pid}))
        seen = samples(metrics)
        child.kill()
    assert seen['process_resident_memory_bytes{process="server"}'] > 10**6
    assert abs(seen['process_start_time_seconds{process="other"}'] - time.time()) < 60
    assert not any('process="other"' in name for name in samples(metrics))


def test_the_time_of_a_batch_counts_for_each_request_that_begins_in_it():
    metrics = Metrics()
    metrics.on_batch(2, [0.1, 0.2], 0.5, failed=False)
    assert metrics.statistics.read(1).phases["compute_infer"].nanoseconds == 1_000_000_000


def test_all_phases_have_the_number_of_requests_that_have_passed_them_all():
    metrics = Metrics()
    recorder = metrics.statistics.recorder(1)
    recorder.add("queue", 0.3, 3)
    recorder.add("success", 1.0, 2)
    recorder.add("fail", 1.0)
    counts = {name: duration.count for name, duration in metrics.statistics.read(1).phases.items()}
    assert counts == {**dict.fromkeys(counts, 2), "fail": 1}
