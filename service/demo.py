"""Shows the whole way in seconds: starts a server on the shipped model, classifies pictures through gRPC, stops it.

python -m service.demo [IMAGE…]
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from service.client import Client, print_table
from service.errors import StartError
from service.settings import ENVIRONMENT_PREFIX, shipped

STOP_SECONDS = 30


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m service.demo", description="Serves, classifies, stops.")
    parser.add_argument("images", nargs="*", metavar="IMAGE", type=Path, help="default: the sample pictures")
    images = parser.parse_args().images or sorted(path for path in shipped("samples").iterdir() if path.suffix != ".md")
    command = [sys.executable, "-m", "service", "--port", "0", "--log-format", "json", "--device", "cpu"]
    # As it comes out of the box: whatever is set for another server is not for this one.
    environment = {key: value for key, value in os.environ.items() if not key.startswith(ENVIRONMENT_PREFIX)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as server:  # noqa: S603 -- our own
        try:
            target = f"127.0.0.1:{_port(server)}"
            with Client(target) as client:
                model = client.model()
                print(f"server at {target}: model {model.version} ({model.variant} on {model.device})")
                print_table(images, client.classify(images, top_k=3))
        except (StartError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        finally:
            server.terminate()
            server.communicate(timeout=STOP_SECONDS)
    print(f"server stopped, exit code {server.returncode}")
    return server.returncode


def _port(server: "subprocess.Popen[str]") -> int:
    """The port, once the server serves."""
    said = []
    for line in server.stderr or ():
        said.append(line)
        event = json.loads(line) if line.startswith("{") else {}
        if "start_seconds" in event:
            return int(event["port"])
    raise StartError(f"the server did not start: {''.join(said).strip()}")


if __name__ == "__main__":
    sys.exit(main())
