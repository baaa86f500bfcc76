"""Addresses and ports: whether a port is free, and reserving one for several processes."""

import contextlib
import ctypes
import errno
import ipaddress
import socket
import struct
from collections.abc import Iterator
from typing import Any, TypeAlias

from service.errors import StartError

_Where: TypeAlias = tuple[socket.AddressFamily, tuple[Any, ...]]
# Largest number of connections that wait to be accepted.
BACKLOG = 1024
# SO_ATTACH_FILTER of Linux, and a filter that drops packets that begin a connection, by SYN in the TCP header.
_ATTACH_FILTER = 26
_DROP_SYN = (
    (0x30, 0, 0, 13),  # load byte 13 of the header
    (0x45, 0, 1, 0x02),  # if SYN is not set, skip the next instruction
    (0x06, 0, 0, 0),  # drop the packet
    (0x06, 0, 0, 0xFFFFFFFF),  # keep it
)
# The machine lacks the address, or its whole family: `localhost` may resolve to ::1 although IPv6 is off.
_ABSENT = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
_EVERY_ADDRESS = ("0.0.0.0", "::")  # noqa: S104 -- compared, not listened on


def address(host: str, port: int) -> str:
    """HOST:PORT in the form that gRPC expects; an IPv6 address is put in brackets."""
    host = host.strip("[]")
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine only."""
    if host.lower().removesuffix(".") == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_free(host: str, port: int) -> None:
    """Checks that no process listens on the port. gRPC itself would print several lines, or share the port silently.

    Raises:
        StartError: The port is in use or needs privileges, or the host is not an address of this machine.
    """
    with contextlib.ExitStack() as stack:
        _bind_all(stack, host, port)


@contextlib.contextmanager
def reserve(host: str, port: int, *, for_grpc: bool = False) -> Iterator[int]:
    """Binds a port without listening, for processes of this user that share it by SO_REUSEPORT; yields its number.

    Until the end of the `with` block, no other call reserves the port, in any process, and `check_free` refuses it.

    Raises:
        StartError: The port cannot be bound or is reserved; see `check_free`.
    """
    with contextlib.ExitStack() as stack:
        # gRPC listens on the addresses of both families if it is told to listen on all of one.
        bound = _bind_all(stack, host, port, both_families=for_grpc)
        try:
            for holder in bound:
                _hold(holder, claim=port != 0)
        except OSError as error:
            raise _cannot_bind(host, port, error) from error
        yield bound[0].getsockname()[1]


def _hold(bound: socket.socket, *, claim: bool) -> None:
    """Makes a socket that is bound with SO_REUSEADDR a holder, which only sockets with SO_REUSEPORT can share.

    Args:
        bound: The socket.
        claim: Whether others may have bound the same port. Not to be used for a port that the system chose, because the
            socket would lose it.

    Raises:
        OSError: Another socket holds the port.
    """
    if claim:
        bound.listen()  # several sockets can bind a port with SO_REUSEADDR, but the kernel lets only one of them listen
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    if claim:
        bound.shutdown(socket.SHUT_RDWR)  # does not listen any more, but is still bound


def hold_new_connections(listener: socket.socket) -> None:
    """Leaves clients that begin to connect from now on without an answer. They try again a second later.

    When a listening socket is closed, the kernel resets the connections that nobody has accepted, and the requests that
    their clients have sent are lost. After this call no further ones arrive, so that all can be accepted before the
    socket is closed. Does nothing where the kernel has no such filters.
    """
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *instruction) for instruction in _DROP_SYN))
    with contextlib.suppress(OSError):
        listener.setsockopt(
            socket.SOL_SOCKET, _ATTACH_FILTER, struct.pack("HL", len(_DROP_SYN), ctypes.addressof(program))
        )


def listen(host: str, port: int, *, shares_port: bool) -> list[socket.socket]:
    """Sockets that listen on the port, one for each address of the host. They do not block.

    Raises:
        StartError: The port cannot be bound; see `check_free`.
    """
    with contextlib.ExitStack() as stack:
        listeners = _bind_all(stack, host, port, *((socket.SO_REUSEPORT,) if shares_port else ()))
        for listener in listeners:
            listener.setblocking(False)
            try:
                listener.listen(BACKLOG)
            except OSError as error:  # another process has begun to listen since it was bound
                raise _cannot_bind(host, port, error) from error
        stack.pop_all()
        return listeners


def _bind_all(
    stack: contextlib.ExitStack, host: str, port: int, *options: int, both_families: bool = False
) -> list[socket.socket]:
    """Binds the port on each address of the host that this machine has, as gRPC does.

    Port 0 is replaced by the number that the system chose for the first address. With `both_families`, 0.0.0.0 and ::
    each stand for both.
    """
    absent: OSError | None = None
    bound: list[socket.socket] = []
    for family, where in _resolve(host, port, both_families):
        try:
            probe = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
            for option in (socket.SO_REUSEADDR, *options):
                probe.setsockopt(socket.SOL_SOCKET, option, 1)
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            probe.bind((where[0], port, *where[2:]))
        except OSError as error:
            if error.errno not in _ABSENT:
                raise _cannot_bind(host, port, error) from error
            absent = error
        else:
            port = probe.getsockname()[1]
            bound.append(probe)
    if absent and not bound:
        raise _cannot_bind(host, port, absent) from absent
    return bound


def _resolve(host: str, port: int, both_families: bool) -> list[_Where]:
    host = host.strip("[]")
    every = both_families and host in _EVERY_ADDRESS
    try:
        found = socket.getaddrinfo(None if every else host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:  # UnicodeError: a part of the name is too long
        raise StartError(f"cannot listen on {host}: {getattr(error, 'strerror', None) or error}") from error
    return list(dict.fromkeys((family, where) for family, _, _, _, where in found))  # a hosts file may repeat a name


def _cannot_bind(host: str, port: int, error: OSError) -> StartError:
    reason = "is already in use" if error.errno == errno.EADDRINUSE else f"cannot be used: {error.strerror}"
    return StartError(f"port {port} of {host} {reason}")
