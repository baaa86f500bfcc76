"""`cifar-serve`, which is also `python -m service`: starts the server, or the supervisor of several workers."""

import gc
import importlib.util
import os
import signal
import sys


def main() -> int:
    """Serves with the options of the command line; returns the exit code."""
    # SIGHUP requests a reload, and must not end a process that does not handle it yet.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    if os.getpid() == 1:  # the kernel ignores the default action of SIGTERM for process 1 of a container
        signal.signal(signal.SIGTERM, lambda number, _: os._exit(128 + number))
    gc.disable()  # objects of imports stay, so collections only delay the start; the server enables it again
    # Nothing of ours is a plugin of pydantic. Looking for plugins reads the metadata of every installed package.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    # The server multiplies no matrices with numpy, which otherwise starts a thread per core for it.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # Imported after the signals are handled, because the imports take time and a signal may arrive meanwhile.
    from cifar_core.errors import needs_extra, open_closed_streams

    open_closed_streams()
    with needs_extra("cpu"):
        from service import logs
        from service.errors import StartError
        from service.settings import parse

    try:
        settings = parse(sys.argv[1:])
        if importlib.util.find_spec("onnxruntime") is None:  # not imported: a supervisor does not need it
            print(
                "error: the module onnxruntime is not installed: "
                "pip install 'cifar-classifier[cpu]', or [cuda] or [openvino]",
                file=sys.stderr,
            )
            return 2
        logs.configure(settings.log_level, settings.log_format)
        if settings.workers > 1:
            from service.workers.supervisor import supervise

            gc.enable()
            return supervise(settings)
        from service.starting import run

        return run(settings)
    except StartError as error:
        print(f"error: {logs.escape(str(error))}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
