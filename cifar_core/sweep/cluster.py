"""Runs of a sweep as tasks of a Ray cluster. All machines must see the run folders under the same path."""

import logging
import os
import socket
from collections.abc import Iterator, Sequence
from typing import Any

import ray

from cifar_core.errors import CifarError
from cifar_core.sweep.processes import Children, Command

# How often Ray starts a task again whose worker or machine ended.
_RETRIES = 10
_CONNECT_SECONDS = 10.0


class ClusterError(CifarError):
    """The cluster cannot be reached."""


def train_on_cluster(commands: Sequence[Command], address: str, gpus: int) -> Iterator[tuple[Command, int]]:
    """Trains runs on a cluster; yields each with its exit code when it has ended.

    Each run is a task that needs as many CPUs as the run has threads. A task whose worker or machine ends is started
    again elsewhere, and continues from the checkpoint.

    Args:
        commands: The runs.
        address: Address of the cluster; "local" starts one on this machine for this call.
        gpus: Number of GPUs of each run.

    Raises:
        ClusterError: The cluster cannot be reached.
    """
    # Ray wants no password, so a Ray that only this sweep uses is asked to stay on the loopback interface. Ray 2.60 may
    # use the address of the machine for some ports all the same.
    own: dict[str, Any] = {"_node_ip_address": "127.0.0.1", "include_dashboard": False} if address == "local" else {}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        _check_address(address)
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **own)
    except OSError as error:
        raise ClusterError(f"--ray {address}: there is no Ray cluster at this address ({error})") from error
    try:
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


def _check_address(address: str) -> None:
    """Connects once, because Ray itself waits for minutes. Raises OSError."""
    host, _, port = address.rpartition(":")
    if port.isdecimal() and "/" not in host:
        socket.create_connection((host, int(port)), _CONNECT_SECONDS).close()
