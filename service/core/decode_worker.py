"""A decode process: reads image files from a socket and answers with pixels, under limits that the kernel enforces.

The only modules of the server that it may import are `decode_checks` and `decode_messages`; it must never import gRPC.
The fork server of `multiprocessing` imports this module once, and each process starts as a copy of it. The server does
not import it, and so has no library that opens images. Data from outside is never unpickled.

What the two sides send each other is described in `decode_messages`.
"""

import contextlib
import ctypes
import os
import resource
import signal
import socket
import traceback
from pathlib import Path

from cifar_core.images import opened, pixels_of
from cifar_core.pixels import ImageLimits, ImageRejected
from service.core.decode_checks import Demand, check_memory, check_structure, demand_by_header, demand_of
from service.core.decode_messages import MAX_REPLY_BYTES, NEEDED, REPLY, REQUEST, Kind, ProcessLimits

_PR_SET_PDEATHSIG = 1
_PR_SET_NO_NEW_PRIVS = 38
_M_MMAP_THRESHOLD = -3
_MIB = 2**20
# Allowance beyond the estimate of a file, for buffers, tables and errors of the estimate.
_MARGIN_BYTES = 32 * _MIB
_OPEN_FILES = 64
_MORE_OOM_SCORE, _MAX_OOM_SCORE = 500, 1000


def main(connection: socket.socket, limits: ProcessLimits, image_limits: ImageLimits) -> None:
    """Answers requests until the socket closes; then ends the process at once."""
    _confine(connection, limits)
    address_space = _address_space()
    hard_limit = address_space + limits.max_memory + image_limits.max_bytes + _MARGIN_BYTES
    allowed = -1
    with contextlib.suppress(ConnectionError), connection.makefile("rb") as requests:
        connection.sendall(REPLY.pack(Kind.READY, 0))
        while len(header := requests.read(REQUEST.size)) == REQUEST.size:
            size, memory = REQUEST.unpack(header)
            if memory != allowed:
                soft_limit = min(hard_limit, address_space + memory + image_limits.max_bytes + _MARGIN_BYTES)
                resource.setrlimit(resource.RLIMIT_AS, (soft_limit, hard_limit))
                allowed = memory
            data = requests.read(size)
            signal.setitimer(signal.ITIMER_PROF, limits.cpu_seconds)
            kind, content = answer(data, memory, limits, image_limits)
            signal.setitimer(signal.ITIMER_PROF, 0)
            connection.sendall(REPLY.pack(kind, len(content)) + content)
    os._exit(0)


def answer(data: bytes, memory: int, limits: ProcessLimits, image_limits: ImageLimits) -> tuple[Kind, bytes]:
    """Decodes one file within `memory` bytes; returns the kind and content of the reply."""
    try:
        structure = check_structure(data)
        demand = demand_by_header(data, image_limits)
        if demand and _too_large(demand, memory, limits):
            return Kind.LARGE, NEEDED.pack(demand.memory)
        with opened(data, image_limits) as image:
            demand = demand_of(image, len(data), structure)
            if _too_large(demand, memory, limits):
                return Kind.LARGE, NEEDED.pack(demand.memory)
            return Kind.PIXELS, pixels_of(image, scalable=structure.is_scalable).tobytes()
    except ImageRejected as rejection:
        return Kind.REJECTED, str(rejection).encode(errors="replace")[:MAX_REPLY_BYTES]
    except Exception:  # noqa: BLE001 -- reported to the parent, which logs it: a fault must not cost other images
        return Kind.FAULT, traceback.format_exc().encode(errors="replace")[-MAX_REPLY_BYTES:]


def _too_large(demand: Demand, memory: int, limits: ProcessLimits) -> bool:
    check_memory(demand, limits.max_memory)
    return demand.memory > memory or demand.pixels > limits.max_pixels


def _confine(connection: socket.socket, limits: ProcessLimits) -> None:
    """Removes the rights and resources of this process that decoding does not need."""
    libc = ctypes.CDLL(None)
    # The parent is the fork server, which ends with the server.
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() == 1:
        os._exit(1)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    # Large blocks go back to the system when they are freed.
    libc.mallopt(_M_MMAP_THRESHOLD, _MIB)
    # A terminal or a service manager sends these signals to all processes of a group. The server needs this process to
    # finish its requests, and then closes the socket.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    os.nice(limits.niceness)
    os.closerange(3, connection.fileno())
    os.closerange(connection.fileno() + 1, 1024)
    for limit, value in ((resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_NOFILE, _OPEN_FILES)):
        resource.setrlimit(limit, (value, value))
    # When memory runs out, the kernel should end this process before the server. Some systems do not permit this.
    with contextlib.suppress(OSError):
        score = Path("/proc/self/oom_score_adj")
        score.write_text(str(min(_MAX_OOM_SCORE, int(score.read_text()) + _MORE_OOM_SCORE)))


def _address_space() -> int:
    """Size of this process' address space in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
