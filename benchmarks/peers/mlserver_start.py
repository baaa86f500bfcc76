"""Starts MLServer with a custom runtime: adaptive batching is on, everything else that costs time is off.

Inference runs in the server's process (parallel_workers 0), because one model uses all cores and a worker process would
add a transfer between processes to each request. A batch waits for further requests for a millisecond at most.
"""

import asyncio
import os

from mlserver import MLServer, ModelSettings, Settings
from mlserver.settings import ModelParameters

settings = Settings(
    debug=False,
    host="127.0.0.1",
    grpc_port=int(os.environ["PORT"]),
    http_port=int(os.environ["PORT"]) + 1,
    metrics_endpoint=None,
    parallel_workers=int(os.environ.get("MLSERVER_WORKERS", "0")),
    gzip_enabled=False,
    logging_settings={"version": 1, "disable_existing_loggers": True, "root": {"level": "ERROR"}},
)
model = ModelSettings(
    name="cifar10",
    implementation="mlserver_runtime.Classifier",
    max_batch_size=64,
    max_batch_time=0.001,
    parameters=ModelParameters(uri="."),
)


async def main() -> None:
    """Serves until it is stopped."""
    await MLServer(settings).start([model])


if __name__ == "__main__":  # worker processes import this file
    asyncio.run(main())
