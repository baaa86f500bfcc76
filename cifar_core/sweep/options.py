"""The options of `python -m cifar_core.sweep`, and what their values mean."""

import argparse
import itertools
import math
import re
from collections.abc import Sequence

from cifar_core.data import add_data_argument
from cifar_core.device import DEVICES
from cifar_core.errors import CifarError
from cifar_core.files import path_option
from cifar_core.recipes import KEYS, RECIPES
from cifar_core.train import add_weights_arguments

MOST_RUNS = 10_000
"""The largest number of runs of a sweep. Each has a folder, whose files are read at the start and at the end."""
LOCAL = "local"
"""The value of `--ray` without an address."""
# The values of these keys contain commas themselves.
_WHOLE_VALUES = ("sizes", "widths")


class SweepError(CifarError):
    """The sweep cannot start."""


def combinations(values: Sequence[str]) -> list[tuple[str, ...]]:
    """Every combination of the values of `--set`, as overrides for `get_recipe`.

    Args:
        values: Such as `dropout=0.2,0.5`. A key that occurs again gets further values. The values of `sizes` and
            `widths` contain commas, so each is given by itself.

    Raises:
        SweepError: A value has no `=`, or there are more than `MOST_RUNS` combinations.
    """
    by_key: dict[str, list[str]] = {}
    for value in values:
        key, equals, text = value.partition("=")
        if not equals:
            raise SweepError(f"--set {value}: expected KEY=VALUE or KEY=VALUE,VALUE…")
        texts = [text] if key in _WHOLE_VALUES else text.split(",")
        by_key.setdefault(key, []).extend(f"{key}={each}" for each in texts)
    check_number(math.prod(len(texts) for texts in by_key.values()))
    return list(itertools.product(*by_key.values()))


def check_number(runs: int) -> None:
    """Raises SweepError if a sweep would have too many runs."""
    if runs > MOST_RUNS:
        raise SweepError(
            f"this sweep would have {runs:,} runs or more, but at most {MOST_RUNS:,} are possible; give fewer recipes, "
            "seeds or values, or several sweeps"
        )


def seeds(text: str) -> list[int]:
    """The seeds of `0-4` or `0,3,7-9`.

    Raises:
        argparse.ArgumentTypeError: The text has another form, or has more than `MOST_RUNS` seeds.
    """
    ranges = []
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]{1,10})(?:-([0-9]{1,10}))?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last or last >= 2**32:
            raise argparse.ArgumentTypeError(
                f"'{text}': expected numbers and ranges from 0 to {2**32 - 1}, such as 0-4"
            )
        ranges.append(range(first, last + 1))
    if sum(map(len, ranges)) > MOST_RUNS:
        raise argparse.ArgumentTypeError(f"'{text}': expected at most {MOST_RUNS:,} seeds; give several sweeps")
    return sorted(set(itertools.chain(*ranges)))


def _count(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"'{text}': expected a whole number from 1")
    return number


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m cifar_core.sweep",
        description="Trains recipes with several seeds and values, several runs at a time. Finished runs are skipped, "
        "and others continue from their checkpoint.",
    )
    parser.add_argument("recipes", nargs="+", metavar="RECIPE", help=f"names of recipes: {', '.join(RECIPES)}")
    parser.add_argument("--seeds", type=seeds, default=[0], metavar="0-4", help="seeds, such as 0-4 or 0,3; default: 0")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=A,B,C",
        help="values of the recipe to try; may be repeated, and every combination is trained. Values of sizes and "
        f"widths contain commas, so give --set sizes=… once for each. Keys: {', '.join(KEYS)}",
    )
    parser.add_argument(
        "--ray",
        nargs="?",
        const=LOCAL,
        metavar="ADDRESS",
        help="train on a Ray cluster, 'auto' or HOST:PORT; without ADDRESS, on a Ray that is started here. All "
        "machines must see the current folder, the runs, the data and the weights under the same paths",
    )
    parser.add_argument(
        "--threads",
        type=_count,
        default=1,
        metavar="N",
        help="threads of each run; several runs with one thread each take less time than one after another with all "
        "cores; default: %(default)s",
    )
    parser.add_argument(
        "--jobs",
        type=_count,
        metavar="N",
        help="runs at a time on this machine; default: the cores divided by --threads",
    )
    add_data_argument(parser)
    add_weights_arguments(parser)
    parser.add_argument("--device", choices=DEVICES, default="auto", help="device to train on; default: %(default)s")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="precision; default: as of cifar_core.train")
    parser.add_argument(
        "--runs", type=path_option, metavar="DIR", help="folder for all runs; default: as in cifar_core.train"
    )
    return parser
