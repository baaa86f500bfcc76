"""Where a decode process begins. The server imports this module, and must not import Pillow with it."""

import socket

from cifar_core.pixels import ImageLimits
from service.core.decode_messages import ProcessLimits


def run(connection: socket.socket, limits: ProcessLimits, image_limits: ImageLimits) -> None:
    """The main function of a decode process; see `decode_worker.main`."""
    from service.core import decode_worker

    decode_worker.main(connection, limits, image_limits)
