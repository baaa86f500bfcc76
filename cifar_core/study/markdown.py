"""Markdown tables, and numbers as they appear in them."""

import statistics
from collections.abc import Iterable, Sequence

from tabulate import DataRow, TableFormat, tabulate

# Like tabulate's own format for GitHub, but cells are not padded: a changed number changes one line of a document.
_FORMAT = TableFormat(
    lineabove=None,
    linebelowheader=lambda widths, alignments: "|" + " --- |" * len(widths),
    linebetweenrows=None,
    linebelow=None,
    headerrow=DataRow("| ", " | ", " |"),
    datarow=DataRow("| ", " | ", " |"),
    padding=0,
    with_header_hide=None,
)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table of text cells."""
    return tabulate(list(rows), header, _FORMAT, disable_numparse=True, stralign=None)


def percent(values: Sequence[float], digits: int = 1) -> str:
    """Mean and sample standard deviation of shares, in per cent: `75.4 ± 0.3`. One value has no deviation."""
    if not values:
        return "–"
    mean = f"{100 * statistics.fmean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {100 * statistics.stdev(values):.{digits}f}"


def points(difference: float) -> str:
    """A difference of shares in percentage points: `-2.4`."""
    return f"{100 * difference:+.1f}"
