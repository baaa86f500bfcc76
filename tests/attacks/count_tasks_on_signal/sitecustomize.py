"""Makes a Python program append the number of its asyncio tasks to the file $TASK_COUNT_FILE when it gets SIGUSR2.

Python imports this module by itself at the start of a program whose PYTHONPATH holds its folder.
"""

import asyncio
import os
import signal
from pathlib import Path


def _write_count(*_: object) -> None:
    # Python runs signal handlers in the main thread, which is that of the server's event loop.
    with Path(os.environ["TASK_COUNT_FILE"]).open("a") as file:
        file.write(f"{len(asyncio.all_tasks())}\n")


signal.signal(signal.SIGUSR2, _write_count)
