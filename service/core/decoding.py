"""Decodes the image files of many requests in a few threads."""

import asyncio
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from cifar_core.images import ImageLimits, ImageRejected, decode

logger = logging.getLogger(__name__)

# How long a thread stays with one request's images before another request has its turn.
SLICE_SECONDS = 0.005

Decoded = NDArray[np.uint8] | ImageRejected


class Decoder:
    """Decodes the files of many requests in a few threads, a slice of time each: none waits for another's large images.

    Args:
        threads: That decode.
        limits: Of each image.
    """

    def __init__(self, threads: int, limits: ImageLimits) -> None:
        self._threads, self._limits = threads, limits
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")

    async def decode(self, files: Sequence[bytes]) -> list[Decoded]:
        """One image, or the reason why there is none, per file, in order. Cancelled, it decodes no further file."""
        results: list[Decoded | None] = [None] * len(files)
        lanes = min(self._threads, len(files))
        if lanes == 1:
            await self._lane(files, results, 0, 1)
        else:
            await asyncio.gather(*(self._lane(files, results, lane, lanes) for lane in range(lanes)))
        return [result for result in results if result is not None]

    async def _lane(self, files: Sequence[bytes], results: list[Decoded | None], place: int, stride: int) -> None:
        loop = asyncio.get_running_loop()
        while place < len(files):
            place = await loop.run_in_executor(self._pool, self._slice, files, results, place, stride)

    def _slice(self, files: Sequence[bytes], results: list[Decoded | None], place: int, stride: int) -> int:
        end = time.monotonic() + SLICE_SECONDS
        while place < len(files):
            try:
                results[place] = decode(files[place], self._limits)
            except ImageRejected as rejection:
                results[place] = rejection
            except Exception:  # a fault of the decoder must not cost the other images their answers
                logger.exception("the decoder failed on an image of %d bytes", len(files[place]))
                results[place] = ImageRejected(
                    "the decoder failed on this image; the server's log says why", internal=True
                )
            place += stride
            if time.monotonic() >= end:
                break
        return place

    def close(self) -> None:
        """Ends the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)
