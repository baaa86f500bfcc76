"""Starts one server process: begins first what takes longest, so that it runs while modules are imported.

The import of a module occupies one core. Meanwhile the fork server of the decode processes starts in a process of its
own, and the model is loaded and tried in a thread, where onnxruntime does not hold Python's global lock.
"""

import asyncio
import gc
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.util import get_temp_dir
from typing import TYPE_CHECKING

from service import open_files, ports
from service.core import fork_server
from service.core.export_numbers import ExportNumbers
from service.core.memory import limit_heap
from service.errors import StartError
from service.settings import Settings

if TYPE_CHECKING:
    from service.core.model_store import ModelStore


def run(
    settings: Settings,
    *,
    shares_port: bool = False,
    exports: int | None = None,
    on_ready: Callable[[Callable[[], bool]], None] = lambda _: None,
) -> int:
    """Serves until SIGTERM or SIGINT. Ends the process with exit code 0, or returns the code if it never served.

    Args:
        settings: All options.
        shares_port: Whether other processes listen on the same port.
        exports: File descriptor of the list of exports, if other processes share it; see service.core.export_numbers.
        on_ready: Called in the event loop when requests are answered, with a function that says whether the engine is
            healthy.

    Raises:
        StartError: The server cannot start.
    """
    started = time.perf_counter()
    gc.disable()  # importing creates objects that stay, which a collection would only scan; `serve` enables it
    limit_heap()
    if not shares_port:
        ports.check_free(settings.host, settings.port)
    open_files.allow_connections(settings.max_connections * (1 if settings.http_port is None else 2))
    temporary_folder = _temporary_folder()
    fork_server.start()
    models = _load(settings, ExportNumbers(exports))
    from service.server import serve  # imported while the model is loaded

    return asyncio.run(serve(settings, models, temporary_folder, started, on_ready, shares_port=shares_port))


def load_models(settings: Settings, numbers: ExportNumbers) -> "ModelStore":
    """The store of the models, with the first one loaded.

    Raises:
        StartError: The model cannot be served.
    """
    from service.core.model_store import ModelStore

    return ModelStore(
        settings.model,
        settings.variant,
        device=settings.device,
        threads=settings.engine_threads,
        max_batch_size=settings.max_batch_size,
        name=settings.model_name,
        numbers=numbers,
    )


def _load(settings: Settings, numbers: ExportNumbers) -> "Future[ModelStore]":
    import service.core.model_store  # noqa: F401 -- here and not in the thread, which should not wait for other imports

    loader = ThreadPoolExecutor(1, thread_name_prefix="model-load")
    try:
        return loader.submit(load_models, settings, numbers)
    finally:
        loader.shutdown(wait=False)


def _temporary_folder() -> str:
    """The folder of `multiprocessing` for the sockets of the decode processes."""
    try:
        return get_temp_dir()
    except OSError as error:
        raise StartError(
            f"no temporary folder can be made ({error.strerror}): set TMPDIR to a writable folder"
        ) from error
