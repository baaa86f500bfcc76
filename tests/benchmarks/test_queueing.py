"""The estimate of latency under load: exact where theory is, and close to a simulation elsewhere."""

import importlib.util
import math
import sys

import numpy as np
import pytest

from tests.conftest import REPOSITORY

# By its path and under a name of its own, because the scripts in benchmarks are no package.
_SPEC = importlib.util.spec_from_file_location("benchmarks_queueing", REPOSITORY / "benchmarks/queueing.py")
queueing = importlib.util.module_from_spec(_SPEC)
sys.modules["benchmarks_queueing"] = queueing
_SPEC.loader.exec_module(queueing)


@pytest.mark.parametrize("load", [0.3, 0.6, 0.9])
def test_one_server_with_exponential_service_times_is_exact(load):
    capacity = 500.0
    servers = queueing.Servers(1, capacity, idle_p99=0.0, variability=1.0)
    rate = load * capacity
    assert servers.mean_wait(rate) == pytest.approx(load / (capacity - rate))
    # P(wait > t) = load · exp(-(capacity - rate) t)
    assert servers.p99(rate) == pytest.approx(math.log(100 * load) / (capacity - rate))


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("load", [0.7, 0.9])
def test_servers_that_take_turns_are_close_to_a_simulation(count, load):
    capacity = 100.0 * count
    servers = queueing.Servers(count, capacity, idle_p99=0.0)
    generator = np.random.default_rng(0)
    # One of the servers: every `count`-th call of a Poisson process, each served in 10 ms (Lindley's recursion).
    gaps = generator.gamma(count, 1 / (load * capacity), 200_000)
    waits = np.empty(len(gaps))
    wait = 0.0
    for number, gap in enumerate(gaps):
        wait = max(0.0, wait + 0.01 - gap)
        waits[number] = wait
    # Kingman's mean is exact for one server here, and an upper bound for several.
    assert 0.5 < waits.mean() / servers.mean_wait(load * capacity) < 1.05
    assert servers.p99(load * capacity) == pytest.approx(np.quantile(waits, 0.99), rel=0.35)


def test_the_variability_is_found_again():
    true = queueing.Servers(2, 800.0, idle_p99=0.003, variability=3.0)
    fixed = queueing.Servers(2, 800.0, idle_p99=0.003)
    assert fixed.fitted(560.0, true.p99(560.0)).variability == pytest.approx(3.0)
    assert fixed.fitted(560.0, 0.001).variability == 0.0


@pytest.mark.parametrize("rate", [0.0, 900.0, 1000.0])
def test_a_rate_that_cannot_be_served_is_refused(rate):
    with pytest.raises(ValueError, match="below the capacity, 900/s"):
        queueing.Servers(3, 900.0, idle_p99=0.003).mean_wait(rate)
