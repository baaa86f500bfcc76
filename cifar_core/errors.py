"""What goes wrong by a user's or a machine's doing, as against a defect of this library."""

import io
import sys
from collections.abc import Callable


class CifarError(Exception):
    """Its message names the thing, the limit and the way out; no traceback is needed to act on it."""


def run_command(main: Callable[[], int]) -> None:
    """Runs a command line's main and exits with its code; a `CifarError` becomes one message and exit code 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # a log file shows each line as it is written
    try:
        code = main()
    except CifarError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130  # as shells have it: 128 + SIGINT
    sys.exit(code)
