"""The fork server of `multiprocessing`, from which decode processes are forked.

Imports nothing else of the service, so that the fork server can be started before anything is loaded: it loads the
decoder in a process of its own while this process loads the model.
"""

import contextlib
import multiprocessing
import multiprocessing.forkserver

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["service.core.decode_preload"])


def start() -> None:
    """Starts the fork server and returns at once. Otherwise it starts with the first decode process.

    An error is not reported here: the start of a decode process then fails as well, and is reported and repeated.
    """
    with contextlib.suppress(OSError):
        multiprocessing.forkserver.ensure_running()
