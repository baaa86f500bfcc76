"""Attacks servers with their default options and prints the measurements next to the limits.

    python -m tests.attacks [--checkout FOLDER ...] [--only TEXT] [--all]

Exit code 1 if a limit of the first checkout does not hold.
"""

import argparse
import sys
import time
from pathlib import Path

from tabulate import tabulate

from tests.attacks import rows
from tests.attacks.observers import REPOSITORY


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkout", type=Path, action="append", help="folder whose server is attacked; may be repeated; default: this"
    )
    parser.add_argument("--only", default="", help="attacks whose name contains this text")
    parser.add_argument("--all", action="store_true", help="every attack of the catalogue, not only the issue's rows")
    arguments = parser.parse_args()
    checkouts = arguments.checkout or [REPOSITORY]
    chosen = {**rows.ISSUE, **(rows.more_rows() if arguments.all else {})}
    chosen = {name: row for name, row in chosen.items() if arguments.only in name}
    if not chosen:
        parser.error(f"no attack has {arguments.only!r} in its name")
    table, holds = [], True
    for name, row in chosen.items():
        for checkout in checkouts:
            print(f"{time.strftime('%H:%M:%S')} {checkout.resolve().name}: {name}", file=sys.stderr, flush=True)
            measured = rows.run(name, row, checkout.resolve())
            for each in measured:
                print(f"    {each.text} ({each.limit_text})", file=sys.stderr, flush=True)
                cells = [each.text, each.limit_text, "yes" if each.holds else "NO"]
                table.append([name, *([checkout.resolve().name] if len(checkouts) > 1 else []), *cells])
            if checkout == checkouts[0]:
                holds &= all(each.holds for each in measured)
    headers = ["attack", *(["checkout"] if len(checkouts) > 1 else []), "measured", "limit", "holds"]
    print(tabulate(table, headers, tablefmt="github"))
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
