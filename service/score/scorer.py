"""Scores the parts of an input with one model: reads, decodes and computes batches at the same time.

The same class works in the process of the command and in the actors of a Ray cluster.
"""

import asyncio
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from cifar_core.pixels import IMAGE_SIZE, ImageLimits, ImageRejected
from service.core.decoding import Decoder
from service.core.engine import NOT_FINITE, Device, rows_not_finite
from service.core.fair_queue import Decoded
from service.core.model_store import Model, load
from service.errors import RequestError, StartError
from service.score import image_files
from service.score.errors import ScoreError
from service.score.output import OutputFolder
from service.score.rows import FileName, Rows, Source
from service.watch import NotReady

# Batches in progress beyond those that are computed: they are read and decoded meanwhile.
_BATCHES_AHEAD = 2
# Files of a batch are read and decoded in groups of about this many bytes.
_GROUP_BYTES = 16 * 2**20
# How often an image is decoded again when its decode process failed for a reason that need not be the image.
_DECODE_ATTEMPTS = 3


@dataclass(frozen=True)
class ScoreOptions:
    """What determines the result of a run besides its input, and how much of the machine it uses.

    Attributes:
        model: Folder of the export.
        variant: Name of the variant in the manifest.
        device: Device to compute on; see `Engine`.
        threads: Number of batches that are computed at the same time, on one thread each.
        decode_processes: Number of processes that decode images.
        batch_size: Number of images computed at once.
        rows_per_part: Number of rows of a part.
        image_limits: Limits on one image file.
        max_decode_seconds: Seconds of CPU time that one image may take.
    """

    model: Path
    variant: str
    device: Device
    threads: int
    decode_processes: int
    batch_size: int
    rows_per_part: int
    image_limits: ImageLimits
    max_decode_seconds: float


class Scored(NamedTuple):
    """A part that was written: its number of rows, and how many of them have an error."""

    rows: int
    failed: int


class Scorer:
    """Scores parts and writes them. Must be created and used in one event loop; close it at the end.

    Args:
        options: The options of the run.
        source: The input.
        output: The output folder, with the inventory.
        model: The model; None loads it.
        on_rows: Called with the number of rows of each batch that has been computed.

    Raises:
        ScoreError: The model cannot be loaded.
    """

    def __init__(
        self,
        options: ScoreOptions,
        source: Source,
        output: OutputFolder,
        model: Model | None = None,
        on_rows: Callable[[int], None] = lambda rows: None,
    ) -> None:
        self.model = model or load_model(options)
        self._options, self._source, self._output, self._on_rows = options, source, output, on_rows
        self.schema = pa.schema(
            [
                source.key,
                ("class", pa.string()),
                ("probabilities", pa.list_(pa.float32())),
                ("error", pa.string()),
                ("model_version", pa.string()),
            ],
            {"classes": json.dumps(self.model.classes), "variant": self.model.variant},
        )
        self._engine = ThreadPoolExecutor(options.threads, thread_name_prefix="engine")
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="reader")
        self._files = ThreadPoolExecutor(2 * options.threads + _BATCHES_AHEAD, thread_name_prefix="files")
        self._slots = asyncio.Semaphore(2 * options.threads + _BATCHES_AHEAD)
        self._reading = asyncio.Lock()
        self._decoder: Decoder | None = None

    def close(self) -> None:
        """Ends the threads and the decode processes."""
        if self._decoder:
            self._decoder.close()
        for executor in (self._engine, self._reader, self._files):
            executor.shutdown(wait=True, cancel_futures=True)

    async def score(self, part: int) -> Scored:
        """Scores a part and writes it. Several parts may be scored at the same time.

        Raises:
            ScoreError: The input cannot be read, the model fails, or the part cannot be written.
        """
        tables: list[asyncio.Task[pa.RecordBatch]] = []
        try:
            async with asyncio.TaskGroup() as group, self._reading:
                batches = self._source.rows(self._output.inventory, part, self._options.batch_size)
                while (rows := await self._next(batches)) is not None:
                    await self._slots.acquire()
                    tables.append(group.create_task(self._batch(rows)))
        except ExceptionGroup as errors:  # not `except*`, which wraps what it raises in Python 3.11.0 to 3.11.3
            ours, others = errors.split(ScoreError)
            if ours is None or others is not None:
                raise
            raise ours.exceptions[0] from ours.exceptions[0].__cause__
        table = pa.Table.from_batches([task.result() for task in tables], self.schema)
        await asyncio.to_thread(self._output.write_part, part, table)
        return Scored(table.num_rows, table.num_rows - table["error"].null_count)

    async def _next(self, batches: Iterator[Rows]) -> Rows | None:
        return await asyncio.get_running_loop().run_in_executor(self._reader, next, batches, None)

    async def _batch(self, rows: Rows) -> pa.RecordBatch:
        try:
            if rows.files is None:
                assert rows.pixels is not None  # noqa: S101 -- a row holds files or pixels
                decoded = rows.pixels
            else:
                decoded = await self._decode_all(rows.files)
            result = await self._computed(rows.keys, decoded)
        finally:
            self._slots.release()
        self._on_rows(result.num_rows)
        return result

    async def _decode_all(self, files: Sequence[FileName | bytes | ImageRejected]) -> list[Decoded]:
        """Reads and decodes the files of a batch, a group of limited size at a time."""
        decoded: list[Decoded] = []
        group: list[FileName | bytes | ImageRejected] = []
        size = 0
        for file in files:
            group.append(file)
            size += file.size if isinstance(file, FileName) else len(file) if isinstance(file, bytes) else 0
            if size >= _GROUP_BYTES:
                decoded += await self._decode(group)
                group, size = [], 0
        return decoded + await self._decode(group) if group else decoded

    async def _decode(self, files: Sequence[FileName | bytes | ImageRejected]) -> list[Decoded]:
        read = functools.partial(_read_all, files, self._options.image_limits.max_bytes)
        results: list[Any] = await asyncio.get_running_loop().run_in_executor(self._files, read)
        if self._decoder is None:
            self._decoder = Decoder(
                self._options.decode_processes, self._options.image_limits, self._options.max_decode_seconds
            )
        remaining = {row: data for row, data in enumerate(results) if isinstance(data, bytes)}
        for _ in range(_DECODE_ATTEMPTS):
            try:
                decoded = await self._decoder.decode(list(remaining.values()))
            except RequestError as error:
                raise ScoreError(f"images cannot be decoded: {error}; then continue with --resume") from error
            for row, result in zip(remaining, decoded, strict=True):
                results[row] = result
            remaining = {
                row: data
                for row, data in remaining.items()
                if isinstance(results[row], ImageRejected) and results[row].internal
            }
            if not remaining:
                break
        return results

    async def _computed(self, keys: pa.Array, decoded: NDArray[np.uint8] | Sequence[Decoded]) -> pa.RecordBatch:
        """The rows of the output for a batch."""
        count, classes = len(keys), self.model.classes
        if isinstance(decoded, np.ndarray):
            images, errors = decoded, pa.nulls(count, pa.string())
        else:
            good = [image for image in decoded if isinstance(image, np.ndarray)]
            images = np.stack(good) if good else np.empty((0, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
            errors = pa.array([str(row) if isinstance(row, ImageRejected) else None for row in decoded], pa.string())
        probabilities = np.zeros((count, len(classes)), np.float32)
        valid = np.asarray(errors.is_null())
        if len(images):
            compute = functools.partial(self._compute, images)
            computed = await asyncio.get_running_loop().run_in_executor(self._engine, compute)
            probabilities[valid] = computed
            if failed := rows_not_finite(computed):
                failed_rows = np.zeros(count, bool)
                failed_rows[np.flatnonzero(valid)[failed]] = True
                errors = pc.if_else(pa.array(failed_rows), NOT_FINITE, errors)
                valid = valid & ~failed_rows
        best = pa.array(probabilities.argmax(axis=1), mask=~valid)
        names = pa.array(classes, pa.string()).take(best)
        offsets = np.append(0, np.cumsum(valid * len(classes))).astype(np.int32)
        lists = pa.ListArray.from_arrays(offsets, probabilities[valid].ravel(), mask=pa.array(~valid))
        version = pa.repeat(pa.scalar(self.model.version), count)
        return pa.RecordBatch.from_arrays([keys, names, lists, errors, version], schema=self.schema)

    def _compute(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        try:
            # A batch on one thread: several batches at once use the cores better than one batch on all of them.
            _, probabilities = self.model.engine.compute(images, alone=self.model.engine.parallel == 1)
        except Exception as error:  # onnxruntime's errors share no other base class
            reason = " ".join(str(error).split())
            raise ScoreError(f"the model fails on a batch of {len(images)} images: {reason}") from error
        return probabilities


def load_model(options: ScoreOptions) -> Model:
    """Loads and verifies the model of a run.

    Raises:
        ScoreError: The model cannot be loaded.
    """
    try:
        return load(
            options.model,
            options.variant,
            device=options.device,
            threads=options.threads,
            max_batch_size=options.batch_size,
        )
    except (StartError, NotReady) as error:
        raise ScoreError(str(error)) from error


def _read_all(files: Sequence[FileName | bytes | ImageRejected], max_bytes: int) -> list[bytes | ImageRejected]:
    return [image_files.read(file.path, max_bytes) if isinstance(file, FileName) else file for file in files]
