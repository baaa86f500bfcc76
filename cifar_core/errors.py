"""The base of all errors that are caused by input or environment and not by a bug, and how commands report them."""

import contextlib
import errno
import io
import os
import select
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

_STDERR = 2
_WRONG_PATH = (
    errno.ENOENT,
    errno.EACCES,
    errno.EPERM,
    errno.EEXIST,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.ENAMETOOLONG,
    errno.EROFS,
)


class CifarError(Exception):
    """An error that a user can act on without a traceback. Its message names the thing, the limit and the way out."""


def run_command(main: Callable[[], int]) -> None:
    """Runs the main function of a command and exits with its code; a `CifarError` becomes one line and exit code 2.

    So does a file or folder that cannot be opened, unless the command has a better message for it. If the reader of
    standard output, such as `head`, ends first, the command ends with exit code 1; if a disk is full, with a line and
    exit code 2.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A log file shows each line as soon as it is written. An encoding without a character shows its number.
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    try:
        with output_may_fail():
            code = main()
    except CifarError as error:
        say(f"error: {error}")
        code = 2
    except OSError as error:
        if error.filename is None or error.errno not in _WRONG_PATH:
            raise
        say(f"error: {error.filename}: {error.strerror}; check the path and its permissions")
        code = 2
    except KeyboardInterrupt:
        say("interrupted")
        code = 130  # the shell's convention: 128 + SIGINT
    sys.exit(code)


@contextlib.contextmanager
def output_may_fail() -> Iterator[None]:
    """Ends the program without a traceback if its output cannot be written.

    Raises:
        SystemExit: 1, without a word, if the reader of standard output, such as `head`, ended first; 2, after a line
            was printed, if a disk is full.
        BrokenPipeError: Another pipe is broken.
    """
    try:
        yield
        if sys.stdout is not None:  # None if the program was started with a closed standard output
            sys.stdout.flush()
    except BrokenPipeError:
        if sys.stdout is None:
            raise
        output = select.poll()
        output.register(sys.stdout, 0)
        if not output.poll(0):
            raise
        _drop_output()
        raise SystemExit(1) from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _drop_output()
        what = error.filename or "the output or a file"
        say(f"error: {what} cannot be written: {error.strerror}; free some space")
        raise SystemExit(2) from None


def open_closed_streams() -> None:
    """Opens /dev/null in place of standard streams that are closed, to which messages then go.

    Otherwise the next files and sockets get their descriptors, to which libraries written in C print, and `print`
    writes messages to standard output. `sys.stdin` and `sys.stdout` stay None.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= _STDERR:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    if sys.stderr is None:
        sys.stderr = os.fdopen(_STDERR, "w", closefd=False)


def say(text: str) -> None:
    """Prints a message to standard error. It is lost if nobody reads it, which changes no exit code."""
    with contextlib.suppress(OSError):  # standard error may go to a full disk
        print(text, file=sys.stderr)


def _drop_output() -> None:
    """Python writes out the rest of standard output when it ends, which would fail again."""
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def program_name(module: str) -> str:
    """The name by which the user started a command, for its help: `cifar-train`, say, or `python -m MODULE`."""
    name = Path(sys.argv[0]).name
    return name if name.startswith("cifar-") else f"python -m {module}"


@contextlib.contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Around imports of packages that only an extra installs: a missing one becomes one line and exit code 2.

    Args:
        extra: Name of the extra in pyproject.toml.

    Raises:
        SystemExit: 2, after the line was printed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "cifar_core", "service"):
            raise  # a bug, not an installation that lacks something
        print(f"error: the module {package} is not installed: pip install 'cifar-classifier[{extra}]'", file=sys.stderr)
        raise SystemExit(2) from None
