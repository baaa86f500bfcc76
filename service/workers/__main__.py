"""One of several server processes; started by service.workers.supervisor, not by people.

Arguments: the settings as JSON, the worker's number, the descriptor of a pipe that learns when requests are answered or
why they will not be, and the supervisor's process id.
"""

import ctypes
import os
import signal
import sys

from service import logs
from service.errors import StartError
from service.settings import Settings
from service.workers.pipe import PIPE_BYTES, READY

_PR_SET_PDEATHSIG = 1


def main() -> int:
    """Serves on the shared port; returns the exit code."""
    settings = Settings.model_validate_json(sys.argv[1])
    number, pipe, supervisor = (int(argument) for argument in sys.argv[2:5])
    # A supervisor that is killed cannot pass the signal on: the kernel does.
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != supervisor:
        return 1

    logs.configure(settings.log_level, settings.log_format, number)
    from service.rpc.server import run

    try:
        return run(settings, shares_port=True, on_ready=lambda: _tell(pipe, READY))
    except StartError as error:
        _tell(pipe, str(error).encode()[:PIPE_BYTES])
        return 2


def _tell(descriptor: int, message: bytes) -> None:
    os.write(descriptor, message)
    os.close(descriptor)


if __name__ == "__main__":
    sys.exit(main())
