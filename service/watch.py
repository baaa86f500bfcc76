"""Watches files by polling and calls a reload function when they change.

Polling, because inotify reports nothing for changes that another machine makes on a network file system.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import TypeAlias

from cifar_core.files import read_regular
from service.errors import StartError

logger = logging.getLogger(__name__)

POLL_SECONDS = 1.0
# Files that failed to load are tried again after 1, 2, 4 and then every 5 s, and at once when they change.
MAX_RETRY_SECONDS = 5.0

Signature: TypeAlias = tuple[tuple[str, int, int, int, int] | tuple[str, int], ...]


class NotReady(StartError):
    """A file is missing, unreadable or does not match another one yet: loading it again later may succeed."""


def read_watched(path: Path, what: str) -> bytes:
    """The content of a file. `what` says in errors which file it is.

    Raises:
        NotReady: It cannot be read.
    """
    try:
        return read_regular(path)
    except OSError as error:
        raise NotReady(f"{what} {path} cannot be read: {error.strerror}") from error


def signature(paths: Iterable[Path]) -> Signature:
    """The state of files: for each its path, inode, size, mtime and ctime in ns; or, if stat fails, path and errno."""
    return tuple(_state(path) for path in paths)


def _state(path: Path) -> tuple[str, int, int, int, int] | tuple[str, int]:
    try:
        status = path.stat()  # follows symbolic links, such as those of a Kubernetes secret
    except OSError as error:
        return str(path), error.errno or 0
    return str(path), status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


class Watcher:
    """Reloads files when they change, until a reload either succeeds or refuses their content.

    The first signature is taken here, so create the watcher before the files are first loaded.

    Args:
        paths: Returns the files to watch. Called in a thread at each poll, because the set of files can change.
        reload: Loads the files. Raises `NotReady` if the attempt should be repeated, any other `StartError` if the
            content is refused; the same content is then not loaded again. After other errors it is called again, too.
        on_failure: Called with the error of a failed reload. A reason that repeats is reported once.
    """

    def __init__(
        self,
        paths: Callable[[], Iterable[Path]],
        reload: Callable[[], Awaitable[None]],
        on_failure: Callable[[Exception], None],
    ) -> None:
        self._paths, self._reload, self._on_failure = paths, reload, on_failure
        self._lock = asyncio.Lock()
        self._settled = signature(paths())  # of the files that were last loaded or refused
        self._failed: Signature | None = None
        self._reason: str | None = None
        self._retry_seconds, self._retry_at = 0.0, 0.0

    async def run(self) -> None:
        """Polls until cancelled."""
        while True:
            await asyncio.sleep(POLL_SECONDS)
            try:
                await self.check()
            except Exception:  # the watcher must survive any bug, or later revocations would be missed
                logger.exception("a check for changed files failed; the next one follows in %g s", POLL_SECONDS)

    async def check(self) -> None:
        """Reloads if the files have changed since they were last loaded or refused."""
        async with self._lock:
            # In a thread: stat on a network file system can take long.
            current = await asyncio.to_thread(lambda: signature(self._paths()))
            if current == self._settled:
                self._reason = self._failed = None
            elif current != self._failed or time.monotonic() >= self._retry_at:
                await self._try(current)

    async def force(self) -> bool:
        """Reloads even if the files have not changed. Returns whether that succeeded; reports a failure."""
        async with self._lock:
            self._reason = None
            return await self._try(await asyncio.to_thread(lambda: signature(self._paths())))

    async def _try(self, current: Signature) -> bool:
        """Reloads once. `current` was taken before, so that the next check notices a change during the reload."""
        try:
            await self._reload()
        except Exception as error:  # noqa: BLE001 -- any error is reported, and the old files stay in use
            self._report(error)
            if isinstance(error, StartError) and not isinstance(error, NotReady):
                self._settled, self._reason = current, None
            else:
                self._schedule_retry(current)
            return False
        self._settled = current
        self._failed = self._reason = None
        return True

    def _schedule_retry(self, current: Signature) -> None:
        same = current == self._failed
        self._retry_seconds = min(2 * self._retry_seconds, MAX_RETRY_SECONDS) if same else POLL_SECONDS
        self._failed, self._retry_at = current, time.monotonic() + self._retry_seconds

    def _report(self, error: Exception) -> None:
        reason = f"{type(error).__name__}: {error}"
        if reason != self._reason:
            self._reason = reason
            self._on_failure(error)
