"""If the server gives up while decode processes start, no process is left and the server ends."""

import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY

SCRIPT = """
import asyncio, sys, time
from cifar_core.pixels import ImageLimits
from service.core.decoding import Decoder

async def main(seconds):
    decoder = Decoder(2, ImageLimits(1000, 1000))
    await asyncio.sleep(seconds)
    if len(sys.argv) < 3:
        decoder.close()

asyncio.run(main(float(sys.argv[1])))
"""


@pytest.mark.parametrize("seconds", ["0", "0.02", "0.1", "0.2", "0.3", "0.5"])
def test_a_process_whose_decoder_is_closed_while_starting_ends(seconds):
    subprocess.run([sys.executable, "-c", SCRIPT, seconds], cwd=REPOSITORY, check=True, timeout=30)


def test_a_process_that_never_closes_its_decoder_ends():
    script = SCRIPT.replace("async def main", "kept = []\n\nasync def main").replace(
        "    await", "    kept.append(decoder)\n    await", 1
    )
    subprocess.run([sys.executable, "-c", script, "1", "open"], cwd=REPOSITORY, check=True, timeout=30)
