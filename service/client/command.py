"""The command line of `python -m service.client`."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from service.client.answers import ClassificationError
from service.client.options import DEFAULT_TARGET, Options, read_token
from service.client.sync import Client
from service.client.table import print_table


def main(arguments: Sequence[str] | None = None) -> int:
    """Classifies the images named on the command line.

    Returns:
        The exit code. 0: all images were classified. 1: the server could not read some of them. 2: a file cannot be
        read here, an option is wrong, or the server does not answer.
    """
    chosen = _parser().parse_args(arguments)
    try:
        check_readable(chosen.images)
        with Client(chosen.server, options_of(chosen)) as client:
            answers = client.classify(chosen.images, chosen.top_k)
    except (ClassificationError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if chosen.json:
        for path, answer in zip(chosen.images, answers, strict=True):
            print(json.dumps({"image": str(path), **asdict(answer)}))
    else:
        print_table(chosen.images, answers)
    return 1 if any(answer.error for answer in answers) else 0


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
        help="give up after this time; default: %(default)s",
    )
    parser.add_argument(
        "--tls", action="store_true", help="use TLS and trust the certificate authorities of the system"
    )
    parser.add_argument(
        "--ca", type=Path, metavar="FILE", help="use TLS and trust the certificate authority in this PEM file"
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


def options_of(chosen: argparse.Namespace) -> Options:
    """The options of the client that a command line asks for.

    Raises:
        OSError: The token file cannot be read.
        ValueError: It holds no token, or the options contradict each other.
    """
    return Options(
        tls=chosen.tls,
        ca=chosen.ca,
        certificate=chosen.certificate,
        key=chosen.key,
        token=read_token(chosen.token_file) if chosen.token_file else None,
        timeout=chosen.timeout,
        allow_plaintext_token=chosen.allow_plaintext_token,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m service.client",
        description="Classifies images through a server and prints a table.",
        epilog="exit code: 0 if all images were classified, 1 if the server could not read some of them, 2 otherwise",
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", type=Path, help="image files to classify")
    parser.add_argument(
        "--server", default=DEFAULT_TARGET, metavar="HOST:PORT", help="address of the server; default: %(default)s"
    )
    parser.add_argument(
        "--top-k",
        type=int,
        default=3,
        metavar="N",
        help="number of classes to print per image, 0 for all; default: %(default)s",
    )
    parser.add_argument("--json", action="store_true", help="print one line of JSON per image instead of a table")
    add_connection_options(parser, timeout=60.0)
    return parser


def check_readable(paths: Sequence[Path]) -> None:
    """Checks that image files can be read, before a server is asked.

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
