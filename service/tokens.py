"""Bearer tokens, read from a file and reloaded when the file changes. Knows no transport.

No secret is logged, shown by repr, or part of an error message: only SHA-256 digests of tokens are kept.
"""

import asyncio
import contextlib
import hashlib
import hmac
import logging
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from service.errors import StartError
from service.watch import Watcher, read_watched

logger = logging.getLogger(__name__)


class RunningCall:
    """A call that was admitted with a token; `revoke` ends it."""

    def __init__(self, task: "asyncio.Task[Any]") -> None:
        self._task = task
        self.revoked = False

    def revoke(self) -> None:
        """Cancels the task of the call."""
        self.revoked = True
        self._task.cancel()


class Tokens:
    """The tokens in a file, one per line; empty lines and lines that start with # are ignored.

    Raises:
        StartError: The file cannot be read or contains no token.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._watcher = Watcher(lambda: [path], self._reload, self._keep_old)
        self._digests = self._load()
        self._calls: defaultdict[bytes, set[RunningCall]] = defaultdict(set)

    def find(self, authorization: str | bytes | None) -> bytes | None:
        """The digest of the token in the metadata `authorization`, or None if it holds no valid token."""
        given = authorization.encode() if isinstance(authorization, str) else authorization or b""
        scheme, _, token = given.partition(b" ")
        digest = hashlib.sha256(token.strip()).digest()
        # Compares with every token, in constant time, so that response times reveal nothing about them.
        matches = [hmac.compare_digest(digest, valid) for valid in self._digests]
        return digest if scheme.lower() == b"bearer" and any(matches) else None

    @contextlib.contextmanager
    def running(self, digest: bytes) -> Iterator[RunningCall]:
        """Registers the current task as a call made with this token, so that revoking the token ends it."""
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a call runs in a task")
        call = RunningCall(task)
        self._calls[digest].add(call)
        if digest not in self._digests:  # revoked since `find`
            call.revoke()
        try:
            yield call
        finally:
            self._calls[digest].discard(call)
            if not self._calls[digest]:
                del self._calls[digest]

    async def watch(self) -> None:
        """Reloads the file when it changes, until cancelled."""
        await self._watcher.run()

    async def _reload(self) -> None:
        valid = await asyncio.to_thread(self._load)
        revoked = [call for digest, calls in self._calls.items() if digest not in valid for call in calls]
        self._digests = valid
        for call in revoked:
            call.revoke()
        logger.info("tokens were read again: %d are valid; running calls ended: %d", len(valid), len(revoked))

    def _keep_old(self, error: Exception) -> None:
        logger.error("the new tokens cannot be used, the old ones stay valid: %s", error)

    def _load(self) -> frozenset[bytes]:
        lines = [line.strip() for line in read_watched(self._path, "token file").splitlines()]
        digests = frozenset(hashlib.sha256(line).digest() for line in lines if line and not line.startswith(b"#"))
        if not digests:
            raise StartError(f"token file {self._path} contains no token: write one token per line")
        return digests
