"""The server's side of one decode process: starts it, sends it files, reads its replies, notices its end."""

import asyncio
import atexit
import contextlib
import multiprocessing
import multiprocessing.util
import os
import signal
import socket
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from multiprocessing.context import ForkServerProcess

from cifar_core.pixels import ImageLimits
from service.core import decode_entry, fork_server
from service.core.decode_messages import REPLY, REQUEST, SIZES, Kind, ProcessLimits
from service.core.fair_queue import Job

_RECEIVE_BYTES = 65_536
_SEND_BUFFER_BYTES = 2**20
_EXIT_CODE_SECONDS = 2.0


def _kill_remaining() -> None:
    """Kills the decode processes that nobody closed, for which `multiprocessing` would wait for ever at the end."""
    for process in multiprocessing.active_children():
        if process.name == _NAME:
            process.kill()


_NAME = "decode"
atexit.register(_kill_remaining)  # runs before the function of `multiprocessing.util`, which is registered already


def start_process(limits: ProcessLimits, image_limits: ImageLimits) -> tuple[ForkServerProcess, socket.socket]:
    """Starts a process and returns it with the server's end of its socket. Blocks until it is forked.

    Call this function and all methods of the process in one thread, because `multiprocessing` is not thread-safe.

    Raises:
        OSError, EOFError: The process cannot be started.
    """
    ours, theirs = socket.socketpair()
    with theirs:
        process = fork_server.context.Process(
            target=decode_entry.run, args=(theirs, limits, image_limits), name=_NAME, daemon=True
        )
        process.start()
    ours.setblocking(False)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
    return process, ours


def discard_process(starting: "Future[tuple[ForkServerProcess, socket.socket]]") -> None:
    """Kills a process that is no longer needed. Otherwise Python would wait for it for ever at exit."""
    if starting.cancelled() or starting.exception() is not None:
        return
    process, connection = starting.result()
    connection.close()
    if process.pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)


class DecodeProcess:
    """A decode process and the jobs that were sent to it and are not answered yet, oldest first.

    Args:
        process: The process; used in the thread of `starter` only.
        connection: The server's end of its socket.
        starter: Executor whose single thread started it.
        on_ready: Called when files can be sent.
        on_reply: Called with the oldest job, and the kind and content of its reply.
    """

    def __init__(
        self,
        process: ForkServerProcess,
        connection: socket.socket,
        starter: Executor,
        on_ready: Callable[[], None],
        on_reply: Callable[[Job, Kind, bytes], None],
    ) -> None:
        self.jobs: deque[Job] = deque()
        self.unanswered_bytes = 0
        self.is_ready = False
        self.was_ready = False
        self.ended_at = 0.0
        self.is_stuck = False
        self.busy_since = time.monotonic()
        self._process, self._socket, self._starter = process, connection, starter
        self._on_ready, self._on_reply = on_ready, on_reply
        self._loop = asyncio.get_running_loop()
        self._ended = asyncio.Event()
        self._received = bytearray()
        self._unsent: deque[memoryview] = deque()

    @property
    def pid(self) -> int | None:
        """Process id; None after it has ended."""
        return None if self._ended.is_set() else self._process.pid

    async def run(self) -> int | None:
        """Handles replies until the process ends. Returns its exit code: negative for a signal, None if unknown."""
        self._loop.add_reader(self._socket, self._read)
        self._loop.add_reader(self._process.sentinel, self._ended.set)
        try:
            await self._ended.wait()
            while self._read():  # replies that it sent before its end
                pass
        finally:
            self._ended.set()
            self._notice_end()
            self._loop.remove_reader(self._process.sentinel)
            self._loop.remove_reader(self._socket)
            self._loop.remove_writer(self._socket)
            self._socket.close()
        return await self._loop.run_in_executor(self._starter, self._exit_code)

    def send(self, job: Job) -> None:
        """Sends the file of a job; `on_reply` receives the reply."""
        data = job.data
        if not self.jobs:
            self.busy_since = time.monotonic()
        self.jobs.append(job)
        self.unanswered_bytes += len(data)
        parts = [memoryview(REQUEST.pack(len(data), job.memory)), memoryview(data)]
        if self._unsent:
            self._unsent.extend(parts)
            return
        try:
            sent = self._socket.sendmsg(parts)
        except BlockingIOError:
            sent = 0
        except OSError:  # the process has ended, which `run` notices
            self._notice_end()
            return
        if sent < REQUEST.size + len(data):
            for part in parts:
                if sent < len(part):
                    self._unsent.append(part[sent:])
                sent = max(0, sent - len(part))
            self._loop.add_writer(self._socket, self._write)

    def kill(self) -> None:
        """Kills the process; `run` then returns."""
        pid = self.pid
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _exit_code(self) -> int | None:
        self._process.join(_EXIT_CODE_SECONDS)  # it has ended, so the fork server reports the code soon
        return self._process.exitcode

    def _notice_end(self) -> None:
        if self.is_ready:
            self.is_ready = False
            self.ended_at = time.monotonic()

    def _write(self) -> None:
        try:
            while self._unsent:
                sent = self._socket.send(self._unsent[0])
                if sent < len(self._unsent[0]):
                    self._unsent[0] = self._unsent[0][sent:]
                else:
                    self._unsent.popleft()
        except BlockingIOError:
            return
        except OSError:
            self._unsent.clear()
        self._loop.remove_writer(self._socket)

    def _read(self) -> bool:
        """Reads once; returns whether more data may be waiting."""
        try:
            content = self._socket.recv(_RECEIVE_BYTES)
        except BlockingIOError:
            return False
        except OSError:
            content = b""
        if not content:  # the process has ended; its sentinel ends the wait in `run`
            self._notice_end()
            self._loop.remove_reader(self._socket)
            return False
        self._received += content
        self._parse()
        return True

    def _parse(self) -> None:
        place = 0
        while len(self._received) - place >= REPLY.size:
            number, size = REPLY.unpack_from(self._received, place)
            if number > max(Kind) or size not in SIZES[Kind(number)]:
                self.kill()  # the process no longer follows the protocol
                return
            end = place + REPLY.size + size
            if len(self._received) < end:
                break
            content = bytes(self._received[place + REPLY.size : end])
            place = end
            self._handle(Kind(number), content)
        del self._received[:place]

    def _handle(self, kind: Kind, content: bytes) -> None:
        if kind is Kind.READY:
            self.is_ready = self.was_ready = True
            self._on_ready()
            return
        if not self.jobs:
            self.kill()
            return
        job = self.jobs.popleft()
        self.unanswered_bytes -= len(job.data)
        self.busy_since = time.monotonic()
        self._on_reply(job, kind, content)
