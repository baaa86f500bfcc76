"""The history of a run, as it is written to history.jsonl: one line per finished epoch.

Each line holds `epoch` (from 1), `train_loss`, `train_accuracy`, `validation_loss`, `validation_accuracy` (accuracies
from 0 to 1; both are None if the recipe did not validate the epoch), `learning_rate` and `seconds`.
"""

import json
from typing import Any

_MEASURED = ("train_loss", "train_accuracy", "learning_rate", "seconds")
_VALIDATED = ("validation_loss", "validation_accuracy")
"""What a line holds besides `epoch`; the latter are None after epochs without validation."""


def to_lines(history: list[dict[str, Any]]) -> bytes:
    """The content of history.jsonl."""
    return "".join(json.dumps(line) + "\n" for line in history).encode()


def from_lines(content: bytes) -> list[dict[str, Any]]:
    """The history in the content of history.jsonl.

    Raises:
        ValueError: It is damaged.
    """
    try:
        history: list[dict[str, Any]] = [json.loads(line) for line in content.splitlines()]
    except RecursionError as error:
        raise ValueError(str(error)) from error
    if (reason := fault(history)) is not None:
        raise ValueError(reason)
    return history


def fault(history: list[Any]) -> str | None:
    """What is wrong with the lines of a history; None if nothing is."""
    for number, line in enumerate(history, 1):
        if not (
            isinstance(line, dict)
            and line.get("epoch") == number
            and all(isinstance(line.get(key), int | float) for key in _MEASURED)
            and all(key in line and isinstance(line[key], int | float | None) for key in _VALIDATED)
        ):
            return f"line {number} does not hold the values of epoch {number}"
    return None


def best_epoch(history: list[dict[str, Any]], weights: str) -> dict[str, Any]:
    """The line of the epoch whose weights a run ends with.

    Args:
        history: the lines of at least one epoch.
        weights: the recipe's `weights`: `best` is the epoch with the best validation accuracy, the first of several;
            `last` is the last epoch.
    """
    return history[-1] if weights == "last" else max(history, key=lambda line: line["validation_accuracy"])
