"""Asks a server for its health, once; for container health checks.

    python -m service.probe [HOST:PORT] [--ca FILE]

Exit code 0: it serves. 1: it answers that it does not, or not at all. With tokens, it needs --health-without-token.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from service import ports
from service.settings import ENVIRONMENT_PREFIX


def main() -> int:
    """The command line; returns the exit code."""
    port = os.environ.get(f"{ENVIRONMENT_PREFIX}PORT", "50051")
    parser = argparse.ArgumentParser(prog="python -m service.probe", description="Asks a server for its health.")
    parser.add_argument(
        "target", nargs="?", default=f"127.0.0.1:{port}", metavar="HOST:PORT", help="default: %(default)s"
    )
    parser.add_argument("--ca", type=Path, help="PEM file of who signed the server's certificate; means TLS")
    parser.add_argument("--timeout", type=float, default=2.0, help="seconds; default: %(default)s")
    chosen = parser.parse_args()
    credentials = grpc.ssl_channel_credentials(chosen.ca.read_bytes()) if chosen.ca else None
    options = ports.channel_options(chosen.target)
    if credentials:
        channel = grpc.secure_channel(chosen.target, credentials, options)
    else:
        channel = grpc.insecure_channel(chosen.target, options)
    with channel:
        try:
            health: Any = health_pb2_grpc.HealthStub(channel)  # its types know no methods
            answer = health.Check(health_pb2.HealthCheckRequest(), timeout=chosen.timeout)
        except grpc.RpcError as error:
            print(f"{chosen.target}: {error.code().name}: {error.details()}", file=sys.stderr)
            return 1
    name = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    print(f"{chosen.target}: {name}")
    return 0 if answer.status == health_pb2.HealthCheckResponse.SERVING else 1


if __name__ == "__main__":
    sys.exit(main())
