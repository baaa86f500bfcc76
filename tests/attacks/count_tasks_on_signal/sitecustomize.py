"""Makes a Python program write the number of its asyncio tasks to standard error, as JSON, when it gets SIGUSR2.

Python imports this module by itself at the start of a program whose PYTHONPATH holds its folder.
"""

import asyncio
import json
import os
import signal


def _write_count(*_: object) -> None:
    # Python runs signal handlers in the main thread, which is that of the server's event loop.
    os.write(2, json.dumps({"message": "pending tasks", "count": len(asyncio.all_tasks())}).encode() + b"\n")


signal.signal(signal.SIGUSR2, _write_count)
