"""Prints classifications as a table in the terminal."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from service.client.answers import Classification

if TYPE_CHECKING:
    from rich.console import Console


def print_table(names: Sequence[str], answers: Sequence[Classification], console: "Console | None" = None) -> None:
    """Prints one row per image and class, with a bar for each probability.

    Args:
        names: Names of the images, as they are to be printed.
        answers: One answer per image, in the same order.
        console: Console to print to; None: a new one for standard output.
    """
    # Imported here because only commands print tables, while every user of the client imports this module.
    from rich.console import Console
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    # Text and not str for all that comes from files or from the server: rich would interpret "[…]" in a str.
    table = Table("image", "class", "", "probability", caption_justify="left")
    versions = sorted({answer.model_version for answer in answers if answer.model_version})
    table.caption = Text(_printable(f"model {', '.join(versions)}")) if versions else None
    table.columns[0].overflow = "fold"  # no part of a long name is left out
    table.columns[3].justify = "right"
    for name, answer in zip(names, answers, strict=True):
        image = Text(_printable(name))
        if answer.error is not None:
            table.add_row(image, Text(_printable(answer.error), style="red"), end_section=True)
        for place, ranked in enumerate(answer.classes):
            bar = ProgressBar(total=1.0, completed=ranked.probability, width=20)
            last = place == len(answer.classes) - 1
            probability = f"{ranked.probability:.1%}"
            table.add_row(Text() if place else image, Text(_printable(ranked.name)), bar, probability, end_section=last)
    (console or Console()).print(table)


def _printable(text: str) -> str:
    """The text with control characters as escapes: a file name must not control the terminal."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )
