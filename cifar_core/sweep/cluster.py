"""Runs of a sweep as tasks of a Ray cluster. All machines must see the run folders under the same path."""

import logging
import os
import socket
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import ray

from cifar_core.errors import CifarError
from cifar_core.sweep.processes import Children, Command

# How often Ray starts a task again whose worker or machine ended.
_RETRIES = 10
_CONNECT_SECONDS = 10.0
# Ray replaces these by the address of the machine.
_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


class ClusterError(CifarError):
    """The cluster cannot be reached, or no run can start on it."""


def train_on_cluster(commands: Sequence[Command], address: str, gpus: int) -> Iterator[tuple[Command, int]]:
    """Trains runs on a cluster; yields each with its exit code when it has ended.

    Each run is a task that needs as many CPUs as the run has threads. A task whose worker or machine ends is started
    again elsewhere, and continues from the checkpoint.

    Args:
        commands: The runs.
        address: Address of the cluster; "local" starts one on this machine for this call.
        gpus: Number of GPUs of each run.

    Raises:
        ClusterError: The cluster cannot be reached, or this machine is too small for a run.
    """
    _connect(address)
    try:
        _check_size(address, max((command.threads for command in commands), default=1), gpus)
        running = {
            ray.remote(_train)
            .options(num_cpus=command.threads, num_gpus=gpus, max_retries=_RETRIES)
            .remote(command): command
            for command in commands
        }
        while running:
            (finished, *_), _ = ray.wait(list(running))
            command = running.pop(finished)
            try:
                code: int = ray.get(finished)
            except ray.exceptions.RayError:  # its worker, machine or memory failed, or the run itself
                code = -1
            yield command, code
    finally:
        ray.shutdown()


def _train(command: Command) -> int:
    return Children().train(command)


def _connect(address: str) -> None:
    """Connects this process to a cluster, or starts one. Raises ClusterError."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    own: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    try:
        _check_address(address)
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **own)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise ClusterError(
            f"--ray {address}: cannot connect to a Ray cluster there: {error}. If the cluster wants a token, "
            "set RAY_AUTH_MODE=token and give the token in ~/.ray/auth_token or RAY_AUTH_TOKEN"
        ) from error


def _check_address(address: str) -> None:
    """Connects once, because Ray itself waits for minutes. Raises OSError."""
    host, _, port = address.rpartition(":")
    if port.isdecimal() and "/" not in host:
        util: Any = ray.util  # the function has no types
        host = util.get_node_ip_address() if host in _LOOPBACK else host.strip("[]")
        try:
            socket.create_connection((host, int(port)), _CONNECT_SECONDS).close()
        except OSError as error:
            raise ConnectionError(f"nothing answers at {host}:{port} ({error})") from error


def _check_size(address: str, cpus: int, gpus: int) -> None:
    """Says if no machine is large enough for a run, because Ray would wait for one silently.

    Raises:
        ClusterError: This machine is the only one and too small.
    """
    cluster: Any = ray  # the function has no types
    machines = [node["Resources"] for node in cluster.nodes() if node["Alive"]]
    if any(machine.get("CPU", 0) >= cpus and machine.get("GPU", 0) >= gpus for machine in machines):
        return
    needs = f"{cpus} CPU(s) and {gpus} GPU(s)" if gpus else f"{cpus} CPU(s)"
    lacking = f"no machine of the Ray cluster has the {needs} that a run needs"
    if address == "local":
        raise ClusterError(f"--ray: {lacking}; give a smaller --threads, or --device cpu, or the ADDRESS of a cluster")
    print(f"{lacking}; the runs wait until one joins", file=sys.stderr)
