"""Starts a server with the shipped model, classifies images over gRPC, prints the answers and stops the server.

python -m service.demo [IMAGE…]
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from service.client import ClassificationError, Client, print_table
from service.client.command import check_readable
from service.errors import StartError
from service.launch import ServerProcess
from service.settings import shipped

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
    images = images or sorted(path for path in shipped("samples").iterdir() if path.suffix != ".md")
    try:
        check_readable(images)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    with ServerProcess("--device", "cpu") as server:
        try:
            server.ready()
            with Client(server.target) as client:
                model = client.model()
                print(f"server at {server.target}: model {model.version} ({model.variant} on {model.device})")
                print_table(images, client.classify(images, top_k=3))
        except (StartError, ClassificationError, OSError) as error:  # TimeoutError is an OSError
            print(f"error: {error}", file=sys.stderr)
            return 2
        code = server.stop(seconds=STOP_SECONDS)
    print(f"server stopped, exit code {code}")
    return code


if __name__ == "__main__":
    sys.exit(main())
