"""Estimates latency under load, from the capacity of the servers and the latency of a server without load.

Servers take turns (round_robin), so each receives every n-th request of a Poisson process. Each server is a queue of
its own (G/G/1), whose mean wait is Kingman's approximation (J. F. C. Kingman, "The single server queue in heavy
traffic", 1961), and whose wait has an exponential tail. Both are exact for one server whose service times are
exponential (M/M/1).
"""

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Servers:
    """Servers that take turns.

    Attributes:
        count: Number of servers.
        capacity: Requests per second that all of them together answer at full load.
        idle_p99: 99th percentile of the latency without load, in seconds.
        variability: Squared coefficient of variation of the service time. 0: each request takes equally long.
    """

    count: int
    capacity: float
    idle_p99: float
    variability: float = 0.0

    def mean_wait(self, rate: float) -> float:
        """Mean time in seconds that a request waits before it is served, at this many requests per second.

        Raises:
            ValueError: The rate is not below the capacity: the queue would grow without end.
        """
        if not 0 < rate < self.capacity:
            raise ValueError(f"the rate is {rate:g}/s; it must be above 0 and below the capacity, {self.capacity:g}/s")
        load = rate / self.capacity
        # Every n-th arrival of a Poisson process: the time between arrivals is Erlang-distributed.
        variability = (1 / self.count + self.variability) / 2
        return load / (1 - load) * variability * self.count / self.capacity

    def p99(self, rate: float) -> float:
        """99th percentile of the latency in seconds; see `mean_wait`."""
        load = rate / self.capacity
        # P(wait > t) = load · exp(-t · load / mean wait)
        return self.idle_p99 + self.mean_wait(rate) / load * max(0.0, math.log(100 * load))

    def fitted(self, rate: float, p99: float) -> "Servers":
        """The same servers with the variability at which the estimate for one measured point is right.

        It is 0 if the measured latency is lower than any variability explains.
        """
        least = replace(self, variability=0.0)
        gain = replace(self, variability=1.0).p99(rate) - least.p99(rate)
        return replace(self, variability=max(0.0, (p99 - least.p99(rate)) / gain))
