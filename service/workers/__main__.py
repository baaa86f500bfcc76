"""The program of one worker process. It is started by the supervisor, not by users.

Arguments: the settings as JSON, the number of the worker, the file descriptor of the pipe to the supervisor, the file
descriptor of the log, the file descriptor of the list of exports, and the process id of the supervisor.
"""

import asyncio
import ctypes
import os
import signal
import sys
from collections.abc import Callable

from service import logs
from service.errors import StartError
from service.settings import Settings
from service.workers.pipe import Kind, Sender

_PR_SET_PDEATHSIG = 1


def main() -> int:
    """Serves on the shared port; returns the exit code."""
    settings = Settings.model_validate_json(sys.argv[1])
    number, pipe, log, exports, supervisor = map(int, sys.argv[2:7])
    # A supervisor that is killed cannot forward a signal, so the kernel sends one when the supervisor ends.
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != supervisor:
        return 1

    if log != sys.stderr.fileno():
        os.set_inheritable(log, False)
    os.set_inheritable(exports, False)
    logs.configure(settings.log_level, settings.log_format, number, log)
    from service.starting import run

    sender = Sender(pipe)
    beating: set[asyncio.Task[None]] = set()

    def on_ready(healthy: Callable[[], bool]) -> None:
        sender.send(Kind.READY)
        beating.add(asyncio.get_running_loop().create_task(sender.beat(healthy)))  # keeps it alive

    try:
        return run(settings, shares_port=True, exports=exports, on_ready=on_ready)
    except StartError as error:
        sender.send(Kind.REFUSED, str(error))
        return 2


if __name__ == "__main__":
    sys.exit(main())
