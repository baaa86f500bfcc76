"""What a training run reports while it trains: TensorBoard events, lines of text, and a progress bar."""

from collections.abc import Mapping
from pathlib import Path
from typing import Self

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


class RunLog:
    """Reports a run from one step on; a context manager that closes the files.

    Args:
        folder: the folder for the events.
        total: number of steps of the run.
        done: number of steps that are done.
        enabled: False writes and prints nothing.
    """

    def __init__(self, folder: Path, total: int, done: int, enabled: bool) -> None:
        self._events = SummaryWriter(str(folder), purge_step=done) if enabled else None
        # None: no progress bar unless the output is a terminal
        self._bar = tqdm(total=total, initial=done, unit="step", disable=None if enabled else True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        if self._events is not None:
            self._events.close()

    def step(self) -> None:
        """Counts one step."""
        self._bar.update()

    def line(self, text: str) -> None:
        """Prints a line above the progress bar."""
        if self._events is not None:
            tqdm.write(text)

    def scalars(self, group: str, values: Mapping[str, float | None], step: int) -> None:
        """Writes values as events named `group/name`; leaves out those that are None."""
        if self._events is not None:
            for name, value in values.items():
                if value is not None:
                    self._events.add_scalar(f"{group}/{name}", value, step)
