"""Prints a summary of a data set, compares its statistics with the published ones, and writes figure 1.

    python -m cifar_core.data [--data ...] [--figure reports/figure-01.png]

Figure 1 shows images of the data set, so it belongs in a folder that git ignores.
"""

import argparse
import logging
from pathlib import Path

from cifar_core.data import add_data_argument, load_dataset, summary
from cifar_core.errors import run_command


def main() -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog="python -m cifar_core.data",
        description="Prints the size, classes and channel statistics of a data set, and draws figure 1.",
    )
    add_data_argument(parser)
    parser.add_argument(
        "--figure",
        type=Path,
        default=Path("reports/figure-01.png"),
        metavar="FILE",
        help="where to write figure 1, four random training images with their labels; default: %(default)s",
    )
    arguments = parser.parse_args()
    logging.basicConfig(format="%(levelname)s: %(message)s")
    dataset = load_dataset(arguments.data)
    print(summary(dataset))
    from cifar_core.study.figures import plot_examples  # here, because matplotlib takes a second to import

    plot_examples(dataset, arguments.figure)
    print(f"figure 1: {arguments.figure}")
    return 0


if __name__ == "__main__":
    run_command(main)
