"""The log on standard error: one line for each event, as text or as JSON. Contains neither secrets nor images.

Lines of the log go straight to standard error, so that none is lost when the process crashes. Native libraries, gRPC
above all, write lines of their own to file descriptor 2. For a JSON log that descriptor is replaced by a pipe, and a
thread turns what arrives there into records of the log.
"""

import atexit
import contextlib
import faulthandler
import io
import json
import logging
import os
import re
import sys
import threading
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
    if style == "json" and descriptor is None:
        stream = _redirect_native_lines()
    else:
        stream = _open(_STDERR if descriptor is None else descriptor)
    # Python's own messages do not go through the pipe, because lines in the pipe are lost in a crash.
    sys.stderr = stream
    faulthandler.enable(stream)
    handler = logging.StreamHandler(stream)
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
    """

    _line = b""

    def write(self, data: "ReadableBuffer", /) -> int:
        """Writes whole lines at once, since several processes write to one log. Keeps the beginning of a line."""
        text = bytes(data)
        self._line += text
        if b"\n" in text or len(self._line) > _MAX_LINE_BYTES:
            self.flush()
        return len(text)

    def flush(self) -> None:
        """Writes all that was kept, or as much as a descriptor accepts that does not block."""
        rest, self._line = memoryview(self._line), b""
        while rest and (written := super().write(rest)):
            rest = rest[written:]


def _open(descriptor: int) -> TextIO:
    stream = _Descriptor(descriptor, "w", closefd=False)
    return io.TextIOWrapper(stream, encoding="utf-8", errors="backslashreplace", write_through=True)


def _redirect_native_lines() -> TextIO:
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
    return _open(standard_error)


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
