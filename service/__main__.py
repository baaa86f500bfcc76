"""`python -m service`: serve."""

import signal
import sys

from service import logs
from service.errors import StartError
from service.settings import parse


def main() -> int:
    """Serves as the command line says; returns the exit code."""
    # It asks for a reload, and must not end a process that has not yet begun to listen to it.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        settings = parse(sys.argv[1:])
        logs.configure(settings.log_level, settings.log_format)
        if settings.workers > 1:
            from service.workers.supervisor import supervise

            return supervise(settings)
        from service.rpc.server import run

        return run(settings)
    except StartError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
