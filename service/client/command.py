"""The command line of `cifar-classify`, which is also `python -m service.client`."""

import argparse
import asyncio
import contextlib
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cifar_core.errors import program_name, say
from cifar_core.pixels import EXTENSIONS
from service.client.aio import AsyncClient
from service.client.answers import ClassificationError
from service.client.base import check_top_k
from service.client.files import Found, Selection
from service.client.options import DEFAULT_TARGET, Options, can_be_sent, read_token
from service.client.output import CsvWriter, JsonWriter, TableWriter, Writer, standard_output
from service.client.streaming import Row, classify_files
from service.client.writing import WritingThread
from service.generated.cifar.v1 import image_classifier_pb2 as messages

if TYPE_CHECKING:
    from rich.console import Console

_MAX_TIMEOUT = 2_147_483  # gRPC counts milliseconds, in places in 32 bits


def main(arguments: Sequence[str] | None = None) -> int:
    """Classifies the images named on the command line.

    Returns:
        The exit code. 0: all images were classified. 1: some of them could not be read, here or by the server, or the
        reader of the output ended first. 2: an option is wrong, or the server does not answer, or the rows cannot be
        written. 130: interrupted.
    """
    chosen = _parser().parse_args(arguments)
    with standard_output():
        thread = WritingThread()
        try:
            check_top_k(chosen.top_k)
            return asyncio.run(_classify(chosen, options_of(chosen), thread))
        except BrokenPipeError:
            raise
        except (ClassificationError, OSError, ValueError) as error:
            say(f"error: {error}")
            return 2
        except KeyboardInterrupt:
            say("interrupted")
            if thread.is_stuck:  # the interpreter would wait for the lock of standard output, which the thread holds
                os._exit(130)
            return 130


async def _classify(chosen: argparse.Namespace, options: Options, thread: WritingThread) -> int:
    files = Selection(chosen.images)
    done = failed = 0
    async with AsyncClient(chosen.server, options) as client:
        model = await client.model()
        with _shown(files, chosen) as (found, console):
            writer = _writer(chosen, model, console)
            rows = classify_files(client, found, chosen.top_k, model.limits.max_image_bytes)
            async with contextlib.aclosing(rows), thread.using(writer):
                async for row in rows:
                    await thread.write(row)
                    done, failed = done + 1, failed + _failed(row)
    _print_summary(done, failed, files.ignored)
    return 1 if failed else 0


def _failed(row: Row) -> bool:
    return row.answer.error is not None


def _writer(chosen: argparse.Namespace, model: messages.GetModelResponse, console: "Console | None") -> Writer:
    if chosen.json:
        return JsonWriter()
    if chosen.csv:
        return CsvWriter(min(chosen.top_k or len(model.classes), len(model.classes)))
    return TableWriter(console)


@contextlib.contextmanager
def _shown(files: Selection, chosen: argparse.Namespace) -> "Iterator[tuple[Iterable[Found], Console | None]]":
    """Shows the progress on the terminal while the files are iterated over.

    The bar needs a terminal of its own: standard error while the rows go elsewhere. Tables can share the terminal with
    it if they are printed through the same console, which is the second value. Other rows on a terminal are themselves
    the progress.
    """
    to_terminal = sys.stdout.isatty()
    if (to_terminal and (chosen.json or chosen.csv)) or not (to_terminal or sys.stderr.isatty()):
        yield files, None
        return
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = [*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("remain")]
    console = Console(stderr=not to_terminal)
    total = sum(1 for _ in files)
    with Progress(*columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False) as bar:
        yield bar.track(files, total=total, description="classifying"), console if to_terminal else None


def _print_summary(done: int, failed: int, ignored: int) -> None:
    """Says on standard error what the rows do not: how many images failed, and which files were no images."""
    parts = []
    if failed:
        parts.append(f"images that could not be read: {failed:,} of {done:,}")
    if ignored:
        parts.append(f"files that were left out because they have no suffix of an image: {ignored:,}")
    if parts:
        say("; ".join(parts))


def add_connection_options(parser: argparse.ArgumentParser, timeout: float) -> None:
    """Adds the options that say how to reach a server; `options_of` reads them.

    Args:
        parser: Parser to which they are added.
        timeout: Default of --timeout in seconds.
    """
    parser.add_argument(
        "--timeout",
        type=float,
        default=timeout,
        metavar="SECONDS",
        help="give up if an answer takes longer; default: %(default)s",
    )
    parser.add_argument(
        "--tls", action="store_true", help="use TLS and trust the certificate authorities of the system"
    )
    parser.add_argument(
        "--ca", type=Path, metavar="FILE", help="use TLS and trust the certificate authority in this PEM file"
    )
    parser.add_argument(
        "--server-name",
        metavar="NAME",
        help="name in the servers' certificates, if it is not the host; needed for TLS to several addresses",
    )
    parser.add_argument(
        "--certificate", type=Path, metavar="FILE", help="PEM file of the client's certificate, for mutual TLS"
    )
    parser.add_argument("--key", type=Path, metavar="FILE", help="PEM file of the private key of --certificate")
    parser.add_argument(
        "--token-file", type=Path, metavar="FILE", help="file whose first token is sent as bearer token"
    )
    parser.add_argument(
        "--allow-plaintext-token", action="store_true", help="send the token without TLS to other machines too"
    )


def token_of(path: Path) -> str:
    """The first token of a file.

    Raises:
        OSError: The file cannot be read.
        ValueError: It holds no token, or one that cannot be sent. The message names the file, never the token.
    """
    try:
        token = read_token(path)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text, but a token file must be; write it anew") from error
    if not can_be_sent(token):
        raise ValueError(
            f"{path}: the first token has characters that cannot be sent, but must be printable ASCII; correct it, and "
            "write the file without a byte order mark"
        )
    return token


def options_of(chosen: argparse.Namespace) -> Options:
    """The options of the client that a command line asks for.

    Raises:
        OSError: The token file cannot be read.
        ValueError: It holds no token that can be sent, the timeout is no time, or the options contradict each other.
    """
    if not 0 < chosen.timeout <= _MAX_TIMEOUT:  # not a number, too, is no time
        raise ValueError(f"--timeout is {chosen.timeout:g}, but must be above 0 and at most {_MAX_TIMEOUT:,} seconds")
    return Options(
        tls=chosen.tls,
        ca=chosen.ca,
        certificate=chosen.certificate,
        key=chosen.key,
        token=token_of(chosen.token_file) if chosen.token_file else None,
        timeout=chosen.timeout,
        server_name=chosen.server_name,
        allow_plaintext_token=chosen.allow_plaintext_token,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program_name("service.client"),
        description="Classifies images through a server. Prints a table, lines of JSON, or CSV.",
        epilog="exit code: 0 if all images were classified, 1 if some of them could not be read or the reader of the "
        "rows ended first, 2 if an option is wrong, the server does not answer, or the rows cannot be written",
    )
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="image file, folder, or pattern in quotes such as 'pictures/**/*.jpg'. Of a folder, all files with one of "
        f"these suffixes are classified, also in its subfolders: {' '.join(EXTENSIONS)}; links to other folders "
        "are not followed, neither there nor by ** in a pattern",
    )
    parser.add_argument(
        "--server",
        default=DEFAULT_TARGET,
        metavar="HOST:PORT",
        help="address of the server; default: %(default)s. Several servers: IP:PORT,IP:PORT,… or dns:///NAME:PORT",
    )
    parser.add_argument(
        "--top-k",
        type=int,
        default=3,
        metavar="N",
        help="number of classes to print per image, 0 for all; default: %(default)s",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print one line of JSON per image instead of a table")
    form.add_argument("--csv", action="store_true", help="print one line of CSV per image instead of a table")
    add_connection_options(parser, timeout=60.0)
    return parser
