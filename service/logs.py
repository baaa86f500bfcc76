"""The log on standard error: one line for each event, as text or as JSON. Contains neither secrets nor images.

Lines of the log go straight to standard error, so that none is lost when the process crashes. A program that reads them
too slowly, or stops reading, must not stop the server: then lines are lost, and the log says how many.

Native libraries, gRPC above all, write lines of their own to file descriptor 2. For a JSON log that descriptor is
replaced by a pipe, and a thread turns what arrives there into records of the log.
"""

import atexit
import contextlib
import faulthandler
import io
import json
import logging
import os
import re
import select
import stat
import sys
import threading
import time
from types import TracebackType
from typing import TYPE_CHECKING, Literal, TextIO

from pythonjsonlogger.json import JsonFormatter

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

# The attributes that every record has; all others were given with `extra`.
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "worker"}
_STDERR = 2
# The beginning of gRPC's lines, as Abseil formats them: severity, date, time, thread, source file and line.
_ABSEIL = re.compile(r"([IWEF])\d{4} \d\d:\d\d:[\d.]+ +\d+ \S+:\d+\] ")
_LEVELS = {"I": logging.INFO, "W": logging.WARNING, "E": logging.ERROR, "F": logging.CRITICAL}
# Abseil announces that its lines go to standard error, which says nothing to readers of a JSON log.
_ABSEIL_NOTICE = "WARNING: All log messages before absl::InitializeLog()"
_MAX_LINE_BYTES = 65536
_at_exit = contextlib.ExitStack()
atexit.register(_at_exit.close)
_END = b"\0end of the pipe\n"
_GRPC = "grpc.core"  # for lines of gRPC's C library; its Python package has loggers of its own
# All lines together wait at most so long in a minute for the reader of a full log; see `_Descriptor`.
_PATIENCE_SECONDS = 1.0


class _HumanFormatter(logging.Formatter):
    """Time, level and message, then the fields given with `extra` as key=value."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 -- the name is logging's
        record.message = escape(record.message)
        extras = {key: value for key, value in vars(record).items() if key not in _STANDARD}
        fields = "".join(f" {key}={json.dumps(value, default=str)}" for key, value in extras.items())
        return super().formatMessage(record) + fields

    def formatException(self, ei: "_ExceptionInfo") -> str:  # noqa: N802
        return "\n".join(escape(line) for line in super().formatException(ei).split("\n"))


_ExceptionInfo = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]


def escape(text: str) -> str:
    r"""The text with control characters as escapes such as `\n` and `\x1b`.

    Messages can contain text from clients, which must neither begin a new line nor control a terminal.
    """
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )


def configure(
    level: str, style: Literal["human", "json"], worker: int | None = None, descriptor: int | None = None
) -> None:
    """Sends log records of this level and above to standard error.

    Args:
        level: "debug", "info", "warning" or "error".
        style: Format of a line. "json" also turns lines that native libraries write to standard error into records.
        worker: Number of the worker process, if there are several; becomes part of each line.
        descriptor: File descriptor to log to, as `log_descriptor` of the parent process returns it. The parent process
            then also handles the lines of this process's native libraries. None: standard error.
    """
    _never_block(_STDERR if descriptor is None else descriptor)
    if style == "json" and descriptor is None:
        target = _redirect_native_lines()
    else:
        target = _Descriptor(_STDERR if descriptor is None else descriptor)
    stream = io.TextIOWrapper(target, encoding="utf-8", errors="backslashreplace", write_through=True)
    # Python's own messages do not go through the pipe, because lines in the pipe are lost in a crash.
    sys.stderr = stream
    faulthandler.enable(stream)
    handler = _Handler(stream, target)
    handler.setFormatter(_formatter(style, worker))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for name in ("service", _GRPC):
        logging.getLogger(name).setLevel(level.upper())
    if style == "json":
        sys.excepthook = _log_exception
        threading.excepthook = lambda problem: _log_exception(
            problem.exc_type, problem.exc_value or problem.exc_type(), problem.exc_traceback
        )


def log_descriptor() -> int:
    """The file descriptor that the log goes to, for the child processes of this one."""
    return sys.stderr.fileno()


def close() -> None:
    """Writes out the rest of the log. Needed only before `os._exit`, which skips Python's normal shutdown."""
    _at_exit.close()
    logging.shutdown()


def _formatter(style: Literal["human", "json"], worker: int | None) -> logging.Formatter:
    if style == "json":
        return JsonFormatter(
            "%(asctime)s%(levelname)s%(name)s%(message)s",
            rename_fields={"asctime": "time", "levelname": "level", "name": "logger"},
            static_fields={} if worker is None else {"worker": worker},
            datefmt="%Y-%m-%dT%H:%M:%S%z",
        )
    prefix = "" if worker is None else f"[{worker}] "
    return _HumanFormatter(f"%(asctime)s %(levelname)-7s {prefix}%(message)s")


def _log_exception(kind: type[BaseException], problem: BaseException, traceback: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, problem, traceback)
        return
    logging.getLogger("service").critical("unexpected error", exc_info=(kind, problem, traceback))


class _Descriptor(io.FileIO):
    """A file descriptor, written to without a buffer but for one line.

    A larger buffer keeps what cannot be written, for example because the disk is full, and each later flush fails: also
    those of `multiprocessing` before it starts a process.

    A pipe, a socket or a terminal is full if its reader does not read. A line then waits a moment and is lost.

    Attributes:
        lost: Number of lines that were lost because there was no room for them; the owner may set it to 0.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self.lost = 0
        self._line = b""
        self._was_cut = False
        self._patience, self._updated = _PATIENCE_SECONDS, time.monotonic()
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLOUT)
        # A file takes any number of bytes. Others that block have room for so many if `poll` says that they have room.
        can_block = os.get_blocking(descriptor) and not stat.S_ISREG(os.fstat(descriptor).st_mode)
        self._piece = select.PIPE_BUF if can_block else None

    def write(self, data: "ReadableBuffer", /) -> int:
        """Writes whole lines at once, since several processes write to one log. Keeps the beginning of a line."""
        text = bytes(data)
        self._line += text
        if b"\n" in text or len(self._line) > _MAX_LINE_BYTES:
            self.flush()
        return len(text)

    def flush(self) -> None:
        """Writes all that was kept. If there is no room for it in time, the rest is lost."""
        if not self._line:
            return
        line, self._line = (b"\n" if self._was_cut else b"") + self._line, b""
        rest = memoryview(line)
        while rest and self._has_room():
            # None: another process was faster and filled it.
            rest = rest[super().write(rest[: self._piece]) or 0 :]
        if rest:
            self.lost += 1
            self._was_cut = self._was_cut or len(rest) < len(line)
        else:
            self._was_cut = False

    def _has_room(self) -> bool:
        """Whether there is room for a part of a line, after a wait if necessary and if patience is left."""
        began = time.monotonic()
        self._patience = min(_PATIENCE_SECONDS, self._patience + (began - self._updated) * _PATIENCE_SECONDS / 60)
        ready = self._poll.poll(0) or self._poll.poll(int(self._patience * 1000))
        self._updated = time.monotonic()
        self._patience = max(0.0, self._patience - (self._updated - began))
        return bool(ready)


class _Handler(logging.StreamHandler[TextIO]):
    """Writes records to the log. The first one after lost lines is followed by one that says how many were lost."""

    def __init__(self, stream: TextIO, descriptor: _Descriptor) -> None:
        super().__init__(stream)
        self._descriptor = descriptor

    def emit(self, record: logging.LogRecord) -> None:
        lost = self._descriptor.lost
        super().emit(record)
        if not lost or self._descriptor.lost != lost:
            return
        self._descriptor.lost = 0
        text = "%d lines of the log before the last one were lost, because they were not read in time"
        super().emit(logging.LogRecord(__name__, logging.WARNING, __file__, 0, text, (lost,), None))
        if self._descriptor.lost:
            self._descriptor.lost = lost


def _never_block(descriptor: int) -> None:
    """Makes writing to a full pipe or terminal fail instead of blocking, for this process and its children alone."""
    if not (stat.S_ISFIFO(os.fstat(descriptor).st_mode) or os.isatty(descriptor)):
        return
    # Setting O_NONBLOCK on the descriptor would change it for the other programs that write to the same place.
    with contextlib.suppress(OSError):  # no /proc, or it belongs to another user: `_Descriptor` copes
        own = os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
        os.dup2(own, descriptor, inheritable=os.get_inheritable(descriptor))
        os.close(own)


def _redirect_native_lines() -> _Descriptor:
    """Replaces file descriptor 2 by a pipe and starts the thread that reads it; returns the true standard error."""
    standard_error = os.dup(_STDERR)
    reading, writing = os.pipe()
    # A thread may write while it holds Python's global lock, for which the reader waits. Losing a line is better than a
    # deadlock.
    os.set_blocking(writing, False)
    os.dup2(writing, _STDERR)
    os.close(writing)
    reader = threading.Thread(target=_log_native_lines, args=(reading,), name="native-log-lines", daemon=True)
    reader.start()

    def restore() -> None:
        """Ends the thread after it has logged the rest of the pipe, which child processes may keep open."""
        with contextlib.suppress(BlockingIOError):
            os.write(_STDERR, b"\n" + _END)
            os.dup2(standard_error, _STDERR)
            reader.join(1)

    _at_exit.callback(restore)
    return _Descriptor(standard_error)


def _log_native_lines(descriptor: int) -> None:
    with contextlib.closing(os.fdopen(descriptor, "rb")) as pipe:
        while (line := pipe.readline(_MAX_LINE_BYTES)) and line != _END:
            _log_native_line(line.decode(errors="backslashreplace").rstrip())


def _log_native_line(line: str) -> None:
    if not line or line.startswith(_ABSEIL_NOTICE):
        return
    if abseil := _ABSEIL.match(line):
        logging.getLogger(_GRPC).log(_LEVELS[abseil[1]], "%s", line[abseil.end() :])
    else:
        logging.getLogger("stderr").warning("%s", line)
