"""Ports: whether one is free, and keeping one for several processes."""

import contextlib
import errno
import ipaddress
import socket
from collections.abc import Iterator
from typing import Any

from service.errors import StartError


def address(host: str, port: int) -> str:
    """HOST:PORT as gRPC takes it; an IPv6 address in brackets."""
    host = host.strip("[]")
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether nobody outside this machine can reach the address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def channel_options(target: str) -> tuple[tuple[str, int], ...]:
    """What a channel to HOST:PORT needs: whatever the environment says, no proxy stands before one's own machine."""
    return (("grpc.enable_http_proxy", 0),) if is_loopback(target.rpartition(":")[0]) else ()


def check_free(host: str, port: int) -> None:
    """That nobody listens there; gRPC itself would say so in several lines, or share the port without a word.

    Raises:
        StartError: Somebody does, the port is not ours to take, or the host is not an address of this machine.
    """
    for family, where in _resolve(host, port):
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            _bind(probe, host, where)


@contextlib.contextmanager
def reserve(host: str, port: int) -> Iterator[int]:
    """Keeps a port, bound but not listened to, for processes that share it by SO_REUSEPORT; yields its number.

    Raises:
        StartError: As `check_free`.
    """
    check_free(host, port)
    family, where = _resolve(host, port)[0]
    with socket.socket(family, socket.SOCK_STREAM) as kept:
        kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        _bind(kept, host, where)
        yield kept.getsockname()[1]


def _resolve(host: str, port: int) -> list[tuple[socket.AddressFamily, tuple[Any, ...]]]:
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise StartError(f"--host {host}: {error.strerror}") from error
    return [(family, where) for family, _, _, _, where in found]


def _bind(probe: socket.socket, host: str, where: tuple[Any, ...]) -> None:
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if probe.family == socket.AF_INET6:
        probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    try:
        probe.bind(where)
    except OSError as error:
        reason = "is taken" if error.errno == errno.EADDRINUSE else f"cannot be listened to: {error.strerror}"
        raise StartError(f"port {where[1]} of {host} {reason}") from error
