"""The command line of `python -m service.score`."""

import argparse
import asyncio
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import TypeAdapter, ValidationError

from cifar_core.pixels import ImageLimits
from service.core.model_store import Model
from service.cpu_quota import usable_cpus
from service.score.description import Input
from service.score.errors import ScoreError
from service.score.output import OutputFolder
from service.score.progress import ScoreProgress
from service.score.rows import Source
from service.score.scorer import Scored, ScoreOptions, Scorer, load_model
from service.score.sources import open_source
from service.score.start import run_of, start
from service.settings import Int32, Settings, shipped_model

_PARTS_AT_ONCE = 2
"""While one part is finished and written, the next one is read already."""
_LOCAL = "local"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command. Exit codes: 0 all images were classified, 1 some rows have an error, 2 the run failed.

    Raises:
        ScoreError: The run cannot start or go on.
    """
    chosen = _parser().parse_args(arguments)
    # Warnings of the decode processes say what the rows say, too.
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.ERROR)
    options = _options(chosen)
    output = OutputFolder(chosen.output)
    with output.lock():
        kind, source = open_source(chosen.input, chosen.column, chosen.content, chosen.key)
        if chosen.input.is_dir() and chosen.output.resolve().is_relative_to(chosen.input.resolve()):
            raise ScoreError(f"{chosen.output}: the output must not lie in the input, {chosen.input}")
        model = load_model(options)
        named = Input(kind=kind, column=chosen.column, content=chosen.content, key=chosen.key)
        description = start(output, source, run_of(named, options, model), resume=chosen.resume)
        sizes = source.part_sizes(output.inventory)
        written = output.written_parts(sizes)
        remaining = [part for part in range(len(sizes)) if part not in written]
        done = sum(sizes[part] for part in written)
        print(f"model {model.version} ({model.variant}), {sum(sizes):,} images in {len(sizes):,} parts")
        _print_left_out(source)
        if done:
            print(f"{done:,} images are scored already")
        if damaged := [output.part(part).name for part in remaining if output.part(part).exists()]:
            print(f"{len(damaged):,} parts are damaged and are computed again: {_some(damaged)}")
        failed = sum(written.values())
        with ScoreProgress(sum(sizes), done) as progress:
            if remaining and chosen.ray:
                from service.score.cluster import score_on_cluster

                where = (chosen.input.resolve(), chosen.column, chosen.content, chosen.key)
                failed += score_on_cluster(chosen.ray, where, output, options, model.sha256, remaining, progress)
            elif remaining:
                failed += asyncio.run(_score_here(options, source, output, model, remaining, progress))
        finished = description.model_copy(update={"rows": sum(sizes), "failed_rows": failed})
        if finished != description:  # a finished run is not changed
            output.write_description(finished)
    print(
        f"{output.path}: finished, {progress.images_per_second:,.0f} images/s"
        + (f"; {failed:,} images could not be classified, see column 'error'" if failed else "")
    )
    return 1 if failed else 0


async def _score_here(
    options: ScoreOptions,
    source: Source,
    output: OutputFolder,
    model: Model,
    parts: Sequence[int],
    progress: ScoreProgress,
) -> int:
    """Scores parts in this process; returns the number of rows that have an error."""
    scorer = Scorer(options, source, output, model, progress.add)
    waiting = iter(parts)
    running: set[asyncio.Task[Scored]] = set()
    errors: list[BaseException] = []
    failed = 0
    try:
        while True:
            while len(running) < _PARTS_AT_ONCE and not errors and (part := next(waiting, None)) is not None:
                running.add(asyncio.create_task(scorer.score(part)))
            if not running:
                break
            # If one part fails, the others that were begun are finished.
            finished, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            errors += [error for task in finished if (error := task.exception())]
            failed += sum(task.result().failed for task in finished if not task.exception())
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        scorer.close()
    if errors:
        raise errors[0]
    return failed


def _print_left_out(source: Source) -> None:
    if count := source.left_out.count:
        print(f"{count:,} files are left out because of their extensions: {_some(source.left_out.examples, count)}")


def _some(names: Sequence[str], count: int = 0) -> str:
    """The first three of some names; `count` is how many there are if the list is shorter."""
    return ", ".join(names[:3]) + (", …" if max(count, len(names)) > 3 else "")


def _options(chosen: argparse.Namespace) -> ScoreOptions:
    if chosen.ray and chosen.device == "cuda":
        raise ScoreError("--ray computes on processors only; leave out --device cuda")
    # An actor of a cluster has one core.
    cores = 1 if chosen.ray else usable_cpus()
    return ScoreOptions(
        model=chosen.model.resolve(),
        variant=chosen.variant,
        device="cpu" if chosen.ray and chosen.device == "auto" else chosen.device,
        threads=chosen.threads or cores,
        decode_processes=chosen.decode_processes or cores,
        batch_size=chosen.batch_size,
        rows_per_part=chosen.rows_per_part,
        image_limits=ImageLimits(chosen.max_image_bytes, chosen.max_image_pixels),
        max_decode_seconds=chosen.max_decode_seconds,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m service.score",
        description="Classifies a folder, a list or Parquet files of images into Parquet files, without a server.",
        epilog="exit code: 0 if all images were classified, 1 if some rows have an error, 2 if the run failed",
    )
    parser.add_argument(
        "input",
        metavar="INPUT",
        type=_path,
        help="a folder of image files, a text file with one path per line, a .parquet file, or a folder of these",
    )
    parser.add_argument("output", metavar="OUTPUT", type=_path, help="folder to write; it must be new or empty")
    parser.add_argument("--resume", action="store_true", help="continue a run that was stopped; starts it if it is new")
    parser.add_argument(
        "--ray",
        nargs="?",
        const=_LOCAL,
        metavar="ADDRESS",
        help="compute on a Ray cluster, 'auto' or HOST:PORT; without ADDRESS, on a Ray that is started here. All "
        "machines must see INPUT, OUTPUT and the model under the same paths",
    )
    parquet = parser.add_argument_group("Parquet input")
    parquet.add_argument(
        "--column", metavar="NAME", help="column with the images; default: the only one that can hold them"
    )
    parquet.add_argument(
        "--content",
        choices=("auto", "files", "pixels"),
        default="auto",
        help="what the column holds: image files, or the RGB pixels of 32 x 32 images; default: by the column's type",
    )
    parquet.add_argument("--key", metavar="NAME", help="column that identifies a row in the output; default: FILE:ROW")
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model", type=Path, default=shipped_model(), help="folder of the export; default: the shipped model"
    )
    model.add_argument("--variant", default=_default("variant"), help="variant of the model; default: %(default)s")
    model.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda", "openvino"),
        default="auto",
        help="where to compute; default: %(default)s",
    )
    _add_limits(parser)
    return parser


def _add_limits(parser: argparse.ArgumentParser) -> None:
    work = parser.add_argument_group("work")
    work.add_argument(
        "--threads",
        type=_as_in_the_server("threads"),
        default=0,
        metavar="N",
        help="number of batches computed at once; default: 0, the available cores",
    )
    work.add_argument(
        "--decode-processes",
        type=_as_in_the_server("decode_processes"),
        default=0,
        metavar="N",
        help="number of processes that decode; default: 0, the available cores",
    )
    work.add_argument(
        "--batch-size",
        type=_checked(Int32),
        default=64,
        metavar="N",
        help="images computed at once; default: %(default)s",
    )
    work.add_argument(
        "--rows-per-part",
        type=_checked(Int32),
        default=8192,
        metavar="N",
        help="rows of an output file; default: %(default)s",
    )
    limits = parser.add_argument_group("limits on one image, as in the server")
    for name, unit in (
        ("max_image_bytes", "bytes of its file"),
        ("max_image_pixels", "width times height"),
        ("max_decode_seconds", "seconds of CPU time for decoding it"),
    ):
        limits.add_argument(
            f"--{name.replace('_', '-')}",
            type=_as_in_the_server(name),
            default=_default(name),
            metavar="N",
            help=f"{unit}; default: %(default)s",
        )


def _default(name: str) -> object:
    """The server's default of an option."""
    return Settings.model_fields[name].default


def _as_in_the_server(name: str) -> Callable[[str], object]:
    """Reads a value within the server's limits for an option."""
    field = Settings.model_fields[name]
    return _checked(Annotated[field.annotation, *field.metadata])


def _checked(kind: Any) -> Callable[[str], object]:  # noqa: ANN401 -- any type that pydantic knows
    adapter = TypeAdapter(kind)

    def read(text: str) -> object:
        try:
            return adapter.validate_python(text)
        except ValidationError as error:
            reason = "; ".join(problem["msg"] for problem in error.errors())
            raise argparse.ArgumentTypeError(f"{text}: {reason}") from None

    return read


def _path(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("the path is empty; write . for the current folder")
    return Path(text)
