"""The base of all errors that are caused by input or environment and not by a bug, and how commands report them."""

import io
import sys
from collections.abc import Callable


class CifarError(Exception):
    """An error that a user can act on without a traceback. Its message names the thing, the limit and the way out."""


def run_command(main: Callable[[], int]) -> None:
    """Runs the main function of a command and exits with its code; a `CifarError` becomes one line and exit code 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # a log file shows each line as soon as it is written
    try:
        code = main()
    except CifarError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130  # the shell's convention: 128 + SIGINT
    sys.exit(code)
