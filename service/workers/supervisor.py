"""Several server processes on one port: started, watched, replaced, stopped. Serves their metrics together.

Must never know gRPC: it must be able to replace a worker whatever happened to it.
"""

import asyncio
import contextlib
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, start_http_server
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from service import ports
from service.core.metrics import PREFIX, Processes
from service.errors import StartError
from service.settings import Settings
from service.workers.pipe import PIPE_BYTES, READY

logger = logging.getLogger(__name__)

FIRST_DELAY = 0.1
LAST_DELAY = 30.0
# A worker that lived so long died of something new.
STABLE_SECONDS = 10.0
# Beyond the grace period, for the interpreter to end.
KILL_SECONDS = 5.0


def supervise(settings: Settings) -> int:
    """Keeps `settings.workers` workers running until SIGTERM or SIGINT; returns the exit code.

    Raises:
        StartError: A port is taken, or a worker cannot start.
    """
    with ports.reserve(settings.host, settings.port) as port, tempfile.TemporaryDirectory(prefix="cifar-") as folder:
        return asyncio.run(Supervisor(settings, port, Path(folder)).run())


class Supervisor:
    """Keeps the workers alive.

    Args:
        settings: Of the server as a whole.
        port: Reserved for the workers.
        metrics_folder: Where workers write their numbers.
    """

    def __init__(self, settings: Settings, port: int, metrics_folder: Path) -> None:
        self._settings, self._port, self._metrics_folder = settings, port, metrics_folder
        self._workers: dict[int, asyncio.subprocess.Process] = {}
        self._serving: set[int] = set()
        self._announced = False
        self._stopping = asyncio.Event()
        self._exit_code = 0
        self._refusal = ""
        self._registry = CollectorRegistry()
        self._restarts = Counter(
            f"{PREFIX}_worker_restarts", "Workers that died and were replaced.", registry=self._registry
        )

    async def run(self) -> int:
        """Until stopped; returns the exit code.

        Raises:
            StartError: A worker cannot start, or the port of the metrics is taken.
        """
        self._show_metrics()
        loop = asyncio.get_running_loop()
        for stop_signal in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(stop_signal, self._stop)
        loop.add_signal_handler(signal.SIGHUP, self._reload)
        logger.info("starting %d workers on port %d", self._settings.workers, self._port, extra={"port": self._port})
        async with asyncio.TaskGroup() as group:
            for number in range(1, self._settings.workers + 1):
                group.create_task(self._keep(number))
        if self._refusal:
            raise StartError(self._refusal)
        return self._exit_code

    def _stop(self) -> None:
        # The second time it reaches workers that are stopping, and ends them at once.
        self._stopping.set()
        self._pass_on(signal.SIGTERM, self._workers)

    def _reload(self) -> None:
        # One that is still starting will take the newest export anyway, and would die of the signal.
        self._pass_on(signal.SIGHUP, self._serving)

    def _pass_on(self, signal_number: signal.Signals, numbers: Iterable[int]) -> None:
        for number in numbers:
            with contextlib.suppress(ProcessLookupError):  # it died a moment ago
                self._workers[number].send_signal(signal_number)

    async def _keep(self, number: int) -> None:
        delay = FIRST_DELAY
        was_ready = False
        while not self._stopping.is_set():
            began = time.monotonic()
            code, told = await self._live(number)
            was_ready |= told == READY
            if self._stopping.is_set():
                if code and told == READY:  # one that was still starting has nothing to lose
                    self._exit_code = 1
                return
            reason = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            if told not in (b"", READY):
                reason = told.decode(errors="replace")
                if not was_ready:  # it would say it again
                    self._refusal = reason
                    self._stop()
                    return
            if time.monotonic() - began > STABLE_SECONDS:
                delay = FIRST_DELAY
            logger.error("worker %d ended: %s; another starts in %g s", number, reason, delay)
            self._restarts.inc()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), delay)
            delay = min(LAST_DELAY, delay * 2)

    async def _live(self, number: int) -> tuple[int, bytes]:
        """One worker from start to end: its exit code, negative for a signal, and READY, or why it did not start."""
        settings = self._settings.model_copy(update={"port": self._port, "metrics_port": None})
        listening, telling = os.pipe()
        try:
            worker = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "service.workers",
                settings.model_dump_json(), str(number), str(telling), str(os.getpid()),
                pass_fds=(telling,),
                env={**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(self._metrics_folder)},
                process_group=0,  # Ctrl-C in a terminal is for the supervisor, which passes it on
            )  # fmt: skip
        finally:
            os.close(telling)
        self._workers[number] = worker
        if self._stopping.is_set():  # while it started
            worker.terminate()
        try:
            # The pipe ends when the worker does, if not before.
            told = await _read(listening)
            if told == READY:
                self._on_ready(number)
            return await self._end_of(worker), told
        finally:
            os.close(listening)
            del self._workers[number]
            self._serving.discard(number)
            mark_process_dead(worker.pid, str(self._metrics_folder))  # type: ignore[no-untyped-call]

    def _on_ready(self, number: int) -> None:
        self._serving.add(number)
        if len(self._serving) == self._settings.workers and not self._announced:
            self._announced = True
            logger.info("all %d workers serve", self._settings.workers)

    async def _end_of(self, worker: asyncio.subprocess.Process) -> int:
        """The worker's exit code, after its end; once the server stops it has its grace period for that."""
        ended = asyncio.create_task(worker.wait())
        stopping = asyncio.create_task(self._stopping.wait())
        await asyncio.wait((ended, stopping), return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        done, _ = await asyncio.wait((ended,), timeout=self._settings.grace + KILL_SECONDS)
        if not done:
            logger.error("process %d did not end %g s after its grace period and is killed", worker.pid, KILL_SECONDS)
            worker.kill()
        return await ended

    def _show_metrics(self) -> None:
        if self._settings.metrics_port is None:
            return
        MultiProcessCollector(self._registry, str(self._metrics_folder))  # type: ignore[no-untyped-call]
        self._registry.register(Processes(self._pids))
        try:
            http, _ = start_http_server(self._settings.metrics_port, self._settings.metrics_host, self._registry)
        except OSError as error:
            raise StartError(
                f"--metrics-port {self._settings.metrics_port} of {self._settings.metrics_host}: {error.strerror}"
            ) from error
        logger.info("metrics at http://%s/metrics", ports.address(self._settings.metrics_host, http.server_port))

    def _pids(self) -> dict[str, int]:
        workers = {f"worker-{number}": worker.pid for number, worker in sorted(self._workers.items())}
        return {"supervisor": os.getpid(), **workers}


async def _read(descriptor: int) -> bytes:
    """What comes first through a pipe; nothing where its other end is closed."""
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(descriptor, readable.set)
    try:
        await readable.wait()
        return os.read(descriptor, PIPE_BYTES)
    finally:
        loop.remove_reader(descriptor)
