"""Starts a server with the shipped model, classifies images over gRPC, prints the answers and stops the server.

python -m service.demo [IMAGE…]
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cifar_core.errors import needs_extra
from service.client import ClassificationError, Client, print_table
from service.client.output import standard_output
from service.errors import StartError
from service.launch import ServerProcess

STOP_SECONDS = 30


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m service.demo",
        description="Starts a server with the shipped model, classifies images, and stops the server.",
    )
    parser.add_argument(
        "images", nargs="*", metavar="IMAGE", type=Path, help="image files to classify; default: the sample images"
    )
    images = parser.parse_args(arguments).images
    with standard_output():
        try:
            images = images or _samples()
            check_readable(images)
            return _classify(images)
        except BrokenPipeError:
            raise
        except (StartError, ClassificationError, OSError) as error:  # TimeoutError is an OSError
            print(f"error: {error}", file=sys.stderr)
            return 2


def _samples() -> list[Path]:
    with needs_extra("cpu"):
        from service.settings import shipped
    return sorted(path for path in shipped("samples").iterdir() if path.suffix != ".md")


def _classify(images: Sequence[Path]) -> int:
    """Returns the exit code of the server that classified the images."""
    with ServerProcess("--device", "cpu") as server:
        server.ready()
        with Client(server.target) as client:
            model = client.model()
            print(f"server at {server.target}: model {model.version} ({model.variant} on {model.device})")
            print_table([image.name for image in images], client.classify(images, top_k=3))
        code = server.stop(seconds=STOP_SECONDS)
    print(f"server stopped, exit code {code}")
    return code


def check_readable(paths: Sequence[Path]) -> None:
    """Checks that image files can be read, before a server is started.

    Raises:
        OSError: Some images cannot be read; the message names all of them.
    """
    problems = []
    for path in paths:
        try:
            with path.open("rb"):
                pass
        except OSError as error:
            problems.append(f"{path}: {error.strerror}")
    if problems:
        raise OSError("these images cannot be read: " + "; ".join(problems))


if __name__ == "__main__":
    sys.exit(main())
