"""Prints classifications as a table in the terminal."""

from collections.abc import Sequence
from pathlib import Path

from service.client.answers import Classification


def print_table(names: Sequence[Path], answers: Sequence[Classification]) -> None:
    """Prints one row per image and class, with a bar for each probability.

    Args:
        names: Paths of the image files.
        answers: One answer per image, in the same order.
    """
    # Imported here because only commands print tables, while every user of the client imports this module.
    from rich.console import Console
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    # Text and not str for all that comes from files or from the server: rich would interpret "[…]" in a str.
    table = Table("image", "class", "", "probability", caption_justify="left")
    table.caption = Text(f"model {answers[0].model_version}") if answers else None
    table.columns[3].justify = "right"
    for name, answer in zip(names, answers, strict=True):
        image = Text(name.name)
        if answer.error is not None:
            table.add_row(image, Text(answer.error, style="red"), end_section=True)
        for place, ranked in enumerate(answer.classes):
            bar = ProgressBar(total=1.0, completed=ranked.probability, width=20)
            last = place == len(answer.classes) - 1
            probability = f"{ranked.probability:.1%}"
            table.add_row(Text() if place else image, Text(ranked.name), bar, probability, end_section=last)
    Console().print(table)
