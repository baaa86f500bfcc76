"""`cifar_core.train` as a child process that stops as soon as its parent ends, and saves its state before.

python -m cifar_core.sweep.child ARGUMENT…

The arguments are those of `cifar_core.train`. Standard input must be a pipe from the parent, who writes nothing to it.
"""

import os
import signal
import threading

from cifar_core.errors import run_command
from cifar_core.train import main


def _stop_with_parent() -> None:
    os.read(0, 1)  # returns when the parent has ended, because the pipe then closes
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    run_command(main)
