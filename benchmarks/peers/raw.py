"""Runs onnxruntime alone in a loop, as an upper bound for servers; prints throughput, latency and CPU time as JSON."""

import json
import sys
import time

import numpy as np
from session import open_session

batch, seconds = int(sys.argv[1]), float(sys.argv[2])
session = open_session()
images = np.random.default_rng(0).integers(0, 256, (batch, 32, 32, 3), dtype=np.uint8)
for _ in range(3):
    session.run(["probabilities"], {"images": images})
times: list[float] = []
began, cpu = time.perf_counter(), time.process_time()
while time.perf_counter() - began < seconds:
    started = time.perf_counter()
    session.run(["probabilities"], {"images": images})
    times.append(1000 * (time.perf_counter() - started))
elapsed = time.perf_counter() - began
print(
    json.dumps(
        {
            "images_per_second": len(times) * batch / elapsed,
            "p50": float(np.percentile(times, 50)),
            "p99": float(np.percentile(times, 99)),
            "cpu_seconds_per_image": (time.process_time() - cpu) / (len(times) * batch),
        }
    )
)
