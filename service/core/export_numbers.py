"""Numbers the exports that a server has served: 1 is the first, 2 the next. Clients see them as versions of the model.

All workers of a server share one list of exports, in a file without a name that they inherit from their supervisor. The
first worker that loads an export appends it. So an export has the same number in all workers, also in those that start
later, and it keeps the number if it is served again after another one. The list begins anew when the server starts.
"""

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager

_RECORD_BYTES = hashlib.sha256().digest_size


def create_list() -> int:
    """The file descriptor of an empty list, in memory. It is not inherited unless `pass_fds` names it."""
    return os.memfd_create("exports")


class ExportNumbers:
    """A list of exports.

    Args:
        descriptor: File descriptor of the list, from `create_list`; None: a new list of this process alone.
    """

    def __init__(self, descriptor: int | None = None) -> None:
        self._descriptor = create_list() if descriptor is None else descriptor

    def number_of(self, export: str) -> int:
        """The number of an export, counted from 1. Thread-safe only if each process has one thread that calls it.

        Args:
            export: Text that identifies the export; two exports never have the same.
        """
        record = hashlib.sha256(export.encode()).digest()
        with self._locked():
            content = os.pread(self._descriptor, os.fstat(self._descriptor).st_size, 0)
            # A process that was killed while it wrote may have left a part of a record, which is overwritten.
            count = len(content) // _RECORD_BYTES
            for place in range(count):
                if content[place * _RECORD_BYTES : (place + 1) * _RECORD_BYTES] == record:
                    return place + 1
            os.pwrite(self._descriptor, record, count * _RECORD_BYTES)
            return count + 1

    @contextmanager
    def _locked(self) -> Iterator[None]:
        # A lock of the process, because the workers share one open file, whose flock() all of them would hold.
        fcntl.lockf(self._descriptor, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.lockf(self._descriptor, fcntl.LOCK_UN)
