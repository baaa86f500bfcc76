"""The study's claims, and whether our runs confirm them."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

from cifar_core.study.markdown import percent, points
from cifar_core.study.runs import DEEP_WITH_MOMENTUM, Rows


@dataclass(frozen=True)
class Claim:
    """A claim that runs can confirm or refute.

    Attributes:
        text: the claim.
        recipes: recipes whose runs the check needs.
        check: returns the measured values as text, and whether they confirm the claim.
    """

    text: str
    recipes: tuple[str, ...]
    check: Callable[[Rows], tuple[str, bool]]


def _order(rows: Rows) -> tuple[str, bool]:
    names = ("dropout-0.2", "dropout-0.5", "baseline", "dropout-0.8")
    accuracies = [statistics.fmean(rows[name].best) for name in names]
    text = " > ".join(f"{name} {100 * accuracy:.1f} %" for name, accuracy in zip(names, accuracies, strict=True))
    holds = accuracies == sorted(accuracies, reverse=True) and len(set(accuracies)) == len(accuracies)
    return (text if holds else text.replace(" > ", ", ")), holds


def _stall(rows: Rows) -> tuple[str, bool]:
    row = rows["baseline"]
    half = len(row.runs[0].history) // 2
    gained = [row.mean(key, -1) - row.mean(key, half) for key in ("validation_accuracy", "train_accuracy")]
    text = (
        f"from epoch {half} to the last, validation {points(gained[0])} points to "
        f"{100 * row.mean('validation_accuracy', -1):.1f} %, training {points(gained[1])} to "
        f"{100 * row.mean('train_accuracy', -1):.1f} %"
    )
    return text, abs(gained[0]) < 0.02 and gained[1] > 0.1


def _loss_stops(rows: Rows) -> tuple[str, bool]:
    row = rows["baseline"]
    epochs = [min(run.history, key=lambda line: line["validation_loss"])["epoch"] for run in row.runs]
    least = statistics.fmean(min(line["validation_loss"] for line in run.history) for run in row.runs)
    text = (
        f"least validation loss at epochs {', '.join(map(str, epochs))} ({least:.2f}), "
        f"at the last {row.mean('validation_loss', -1):.2f}"
    )
    return text, all(abs(epoch - 13) <= 3 for epoch in epochs)


def _losses(rows: Rows) -> tuple[str, bool]:
    plain, dropped = rows["baseline"], rows["dropout-0.2"]
    values = [row.mean(key, -1) for key in ("train_loss", "validation_loss") for row in (plain, dropped)]
    text = (
        f"at the last epoch training loss {values[0]:.2f} without and {values[1]:.2f} with p = 0.2, "
        f"validation loss {values[2]:.2f} and {values[3]:.2f}"
    )
    return text, values[1] > values[0] and values[3] < values[2]


def _sixty_epochs(rows: Rows) -> tuple[str, bool]:
    short, long = (statistics.fmean(rows[name].best) for name in ("dropout-0.8", "dropout-0.8-60"))
    return f"{100 * short:.1f} % at 20, {100 * long:.1f} % at 60: {points(long - short)}", 0.03 <= long - short <= 0.07


def _eighty_percent(rows: Rows) -> tuple[str, bool]:
    test = rows["deep"].test
    return f"{percent(test, 2)} % on the test images of this data", bool(test) and statistics.fmean(test) > 0.8


def _momentum(rows: Rows) -> tuple[str, bool]:
    without, with_it = rows["deep"], rows[DEEP_WITH_MOMENTUM]
    text = (
        f"best validation accuracy {percent(without.best)} % without, {percent(with_it.best)} % with it; "
        f"training loss at the last epoch {without.mean('train_loss', -1):.2f} and "
        f"{with_it.mean('train_loss', -1):.2f} (ln 10 = 2.30 is chance)"
    )
    return text, statistics.fmean(without.best) > statistics.fmean(with_it.best)


CLAIMS = (
    Claim(
        "Dropout 0.2 beats 0.5 beats none beats 0.8 (best validation accuracy)",
        ("baseline", "dropout-0.2", "dropout-0.5", "dropout-0.8"),
        _order,
    ),
    Claim("Without dropout validation accuracy stalls while training accuracy goes on", ("baseline",), _stall),
    Claim("Without dropout validation loss stops improving around epoch 13 (within 3)", ("baseline",), _loss_stops),
    Claim("With p = 0.2 training loss is higher and validation loss lower", ("baseline", "dropout-0.2"), _losses),
    Claim("60 epochs at p = 0.8 bring about 5 points (3 to 7)", ("dropout-0.8", "dropout-0.8-60"), _sixty_epochs),
    Claim("The deep model exceeds 80 % on the test set", ("deep",), _eighty_percent),
    Claim("Ours: the deep recipe trains better without momentum", ("deep", DEEP_WITH_MOMENTUM), _momentum),
)
