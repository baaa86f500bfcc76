"""Starts several server processes on one port, watches, replaces and stops them, and shows their metrics together.

This module does not use gRPC. The supervisor survives the failure of a worker, and of the system that should start one;
it gives up only if a worker refuses to start before it has ever served.
"""

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.multiprocess import MultiProcessCollector

from service import metrics_http, ports
from service.core.export_numbers import create_list
from service.core.metrics import PREFIX, Processes
from service.errors import StartError
from service.settings import Settings
from service.workers.hang import CHECK_SECONDS
from service.workers.metric_files import MetricFiles
from service.workers.process import WorkerProcess

logger = logging.getLogger(__name__)

FIRST_DELAY = 0.1
LAST_DELAY = 30.0
# A worker that served for longer than this was healthy, and the pauses begin with the first one again.
STABLE_SECONDS = 10.0
# Time after the grace period that a worker has to exit.
KILL_SECONDS = 5.0


def supervise(settings: Settings) -> int:
    """Keeps `settings.workers` workers running until SIGTERM or SIGINT; returns the exit code.

    Raises:
        StartError: A port is taken, a worker cannot start, or there is no folder for temporary files.
    """
    with contextlib.ExitStack() as stack:
        port = stack.enter_context(ports.reserve(settings.host, settings.port, for_grpc=True))
        http_port = settings.http_port
        if http_port is not None:
            http_port = stack.enter_context(ports.reserve(settings.http_address, http_port))
        reserved = settings.model_copy(update={"port": port, "http_port": http_port})
        folder = stack.enter_context(_temporary_folder(settings.workers))
        return asyncio.run(Supervisor(reserved, folder).run())


@contextlib.contextmanager
def _temporary_folder(workers: int) -> Iterator[Path]:
    try:
        folder = tempfile.TemporaryDirectory(prefix="cifar-", ignore_cleanup_errors=True)
    except OSError as error:
        raise StartError(
            f"--workers {workers} needs a folder for temporary files, where the workers keep their metrics "
            f"({error.strerror}): set TMPDIR to a folder that can be written to"
        ) from error
    with folder as name:
        yield Path(name)


class Backoff:
    """Pauses before a worker is started again: they double until one has served for a while.

    The time that a worker spends loading does not count: a worker that loads for ten seconds and then crashes is also
    started again after growing pauses.
    """

    def __init__(self) -> None:
        self._next = FIRST_DELAY

    def delay(self, served_seconds: float) -> float:
        """Seconds to wait after the end of a worker that served for `served_seconds`."""
        if served_seconds > STABLE_SECONDS:
            self._next = FIRST_DELAY
        delay = self._next
        self._next = min(LAST_DELAY, delay * 2)
        return delay


class Supervisor:
    """Keeps the workers running.

    Args:
        settings: Settings of the server as a whole. Their ports are reserved for the workers.
        folder: Folder to which the workers write their metrics.
    """

    def __init__(self, settings: Settings, folder: Path) -> None:
        self._settings, self._folder = settings, folder
        self._workers: dict[int, WorkerProcess] = {}
        self._announced = False
        self._stopping = asyncio.Event()
        self._signalled = False
        self._exit_code = 0
        self._refusal = ""
        self._metric_files = MetricFiles(folder)
        self._exports = create_list()
        self._registry = CollectorRegistry()
        self._restarts = Counter(
            f"{PREFIX}_worker_restarts", "Workers that ended and were replaced.", registry=self._registry
        )
        self._failures = Counter(
            f"{PREFIX}_worker_failures",
            "Workers that ended or could not be started, by reason: 'exit' by itself, 'signal' from outside or crash, "
            "'hang' without heartbeats, 'stuck' engine, 'start' failed.",
            ["reason"],
            registry=self._registry,
        )
        for reason in ("exit", "signal", "hang", "stuck", "start"):
            self._failures.labels(reason)

    async def run(self) -> int:
        """Runs until stopped; returns the exit code.

        Raises:
            StartError: A worker cannot start, or the port of the metrics is taken.
        """
        settings = self._settings
        MultiProcessCollector(self._registry, str(self._folder))  # type: ignore[no-untyped-call]
        self._registry.register(Processes(self._pids))
        async with metrics_http.show(self._registry, settings.metrics_host, settings.metrics_port):
            self._handle_signals()
            logger.info(
                "starting %d workers on port %d", settings.workers, settings.port, extra={"port": settings.port}
            )
            watching = asyncio.create_task(self._watch())
            try:
                async with asyncio.TaskGroup() as group:
                    for number in range(1, settings.workers + 1):
                        group.create_task(self._keep(number))
            finally:
                watching.cancel()
                self._kill_all()
        if self._refusal:
            raise StartError(self._refusal)
        return self._exit_code

    # Signals

    def _handle_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_stop_signal, number)
        loop.add_signal_handler(signal.SIGHUP, self._reload)
        loop.add_signal_handler(signal.SIGCHLD, self._reap)

    def _on_stop_signal(self, number: signal.Signals) -> None:
        """The first signal lets requests in flight finish, the second ends everything at once."""
        if not self._signalled:
            self._signalled = True
            self._stop()
            return
        logger.warning("second signal to stop: requests in flight are dropped")
        self._kill_all()
        shutil.rmtree(self._folder, ignore_errors=True)
        # The kernel ignores the default action of a signal in process 1, as this one is in a container.
        os._exit(128 + number)

    def _stop(self) -> None:
        if self._stopping.is_set():  # a worker cannot start
            return
        self._stopping.set()
        for worker in self._workers.values():
            worker.signal(signal.SIGTERM)
        asyncio.get_running_loop().call_later(self._settings.grace + KILL_SECONDS, self._kill_remaining)

    def _kill_remaining(self) -> None:
        for number in self._workers:
            logger.error("worker %d has not ended %g s after its grace period and is killed", number, KILL_SECONDS)
        self._kill_all()

    def _kill_all(self) -> None:
        for worker in self._workers.values():
            worker.kill()

    def _reload(self) -> None:
        # A worker that is still starting will load the newest export anyway, and the signal would end it.
        for worker in self._workers.values():
            if worker.ready_at is not None:
                worker.signal(signal.SIGHUP)

    # Watching

    def _reap(self) -> None:
        """Collects the exit codes of ended children, and as process 1 those of processes without a parent."""
        for worker in list(self._workers.values()):
            worker.reap()
        if os.getpid() != 1:
            return
        workers = {worker.pid for worker in self._workers.values()}
        with contextlib.suppress(ChildProcessError):
            while ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                if ended.si_pid in workers:  # it ended a moment ago; the next signal collects it
                    return
                os.waitpid(ended.si_pid, 0)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(CHECK_SECONDS)
            try:
                self._reap()  # signals can be lost while many arrive
                if not self._stopping.is_set():  # afterwards the grace period is the limit
                    for worker in self._workers.values():
                        worker.kill_if_hanging()
            except Exception:
                logger.exception("the workers could not be checked; the next check follows in %g s", CHECK_SECONDS)

    def _pids(self) -> dict[str, int]:
        workers = {f"worker-{number}": worker.pid for number, worker in sorted(self._workers.items())}
        return {"supervisor": os.getpid(), **workers}

    # Keeping one worker running

    async def _keep(self, number: int) -> None:
        backoff = Backoff()
        was_ready = False
        while not self._stopping.is_set():
            failure, reason, served = await self._run_worker(number)
            if self._stopping.is_set():
                return
            was_ready |= served is not None
            if failure == "start" and not was_ready:  # it would fail again for the same reason
                self._refusal = reason
                self._stop()
                return
            delay = backoff.delay(served or 0.0)
            logger.error("worker %d ended: %s; another starts in %g s", number, reason, delay)
            self._restarts.inc()
            self._failures.labels(failure).inc()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), delay)

    async def _run_worker(self, number: int) -> tuple[str, str, float | None]:
        """One worker from its start to its end.

        Returns:
            Why it ended, as a word and as a phrase, and for how many seconds it served, None if it never did.
        """
        settings = self._settings.model_copy(update={"metrics_port": None})
        # A worker that is killed cannot remove its temporary files. The name is short because the files may be sockets,
        # whose paths have at most 107 bytes.
        temporary_folder = self._folder / str(number)
        try:
            # A program that cleans up temporary files may have removed the outer folder.
            temporary_folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            worker = WorkerProcess(number, settings, self._folder, temporary_folder, self._exports, self._on_ready)
        except OSError as error:
            return "start", f"the process cannot be started: {error.strerror}", None
        self._workers[number] = worker
        try:
            code = await worker.ended
        finally:
            del self._workers[number]
            self._metric_files.remove(worker.pid)
            shutil.rmtree(temporary_folder, ignore_errors=True)  # files that are still in use are removed at the end
        served = worker.ready_seconds()
        if code and served is not None and self._stopping.is_set():  # a worker that was still starting loses nothing
            self._exit_code = 1
        return *worker.why_it_ended(code), served

    def _on_ready(self) -> None:
        serving = sum(worker.ready_at is not None for worker in self._workers.values())
        if serving == self._settings.workers and not self._announced:
            self._announced = True
            logger.info("all %d workers serve", serving)
