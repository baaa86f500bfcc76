"""The run folder, `runs/<recipe>/<seed>/`: what training leaves behind, and all that others read of a run.

    recipe.json     the recipe's values, seed, precision, data and machine
    history.jsonl   a line per epoch
    best.pt         the weights of the epoch with the best validation accuracy
    last.pt         everything needed to go on
    events.*        TensorBoard

Every file is written beside its place and renamed into it, so that a kill at any moment leaves a usable folder. Files
are read back without pickle. Knows nothing of models or data.
"""

import fcntl
import io
import json
import os
import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from cifar_core.errors import CifarError


class RunError(CifarError):
    """A run folder that is missing, damaged, in use or another run's; or one that cannot be written."""


def atomic_write(path: Path, content: bytes) -> None:
    """Replaces a file as a whole: after a kill or a failed write there is the old content or the new, never a part.

    Raises:
        RunError: it cannot be written, for want of space say; what was there before is intact.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)  # else a power cut may undo the rename
        finally:
            os.close(directory)
    except OSError as error:
        partial.unlink(missing_ok=True)
        before = "what was there before is intact" if path.exists() else "nothing was there before"
        raise RunError(
            f"{path}: cannot be written, {error.strerror} ({len(content):,} bytes); {before}; "
            "make room or permit writing, then go on with --resume"
        ) from error


def to_json(value: object) -> bytes:
    """JSON as this project writes it: indented, in the order given, with a newline at the end."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a `.pt` file onto the CPU, tensors and plain values only: a file from outside cannot run code.

    Raises:
        RunError: missing, damaged, or holding anything else.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise RunError(f"{path}: no such checkpoint; train with: python -m cifar_core.train RECIPE") from None
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RunError(
            f"{path}: not a checkpoint of this library, or damaged ({reason}); train again, or take another"
        ) from error
    if not isinstance(checkpoint, dict) or not {"model", "recipe", "classes", "data"} <= checkpoint.keys():
        raise RunError(
            f"{path}: not a checkpoint of this library (it lacks model, recipe, classes or data); take another"
        )
    return checkpoint


class RunFolder:
    """One run's files.

    Args:
        path: `runs/<recipe>/<seed>`; need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.best = path / "best.pt"
        self.last = path / "last.pt"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the folder (made if need be) against a second process.

        Raises:
            RunError: another process trains in it, or it cannot be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            stream = (self.path / ".lock").open("w")
        except OSError as error:
            raise RunError(
                f"{self.path}: cannot be written, {error.strerror}; choose another place with --runs DIR"
            ) from error
        with stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunError(
                    f"{self.path}: another process is training here; wait for it, or choose another --seed"
                ) from None
            yield

    def write_description(self, description: dict[str, Any]) -> None:
        """Writes recipe.json."""
        atomic_write(self.path / "recipe.json", to_json(description))

    def description(self) -> dict[str, Any]:
        """recipe.json as written.

        It holds `recipe`, `seed`, `precision`, `data`, `classes`, `environment` and `date` (UTC, of its start).

        Raises:
            RunError: missing or damaged.
        """
        try:
            value = json.loads((self.path / "recipe.json").read_bytes())
        except FileNotFoundError:
            raise RunError(f"{self.path}: not a run folder, it has no recipe.json; train, or name another") from None
        except ValueError as error:
            raise RunError(
                f"{self.path / 'recipe.json'}: damaged ({error}); remove the folder and train again"
            ) from error
        if not isinstance(value, dict) or not {"recipe", "seed", "precision", "data", "classes"} <= value.keys():
            raise RunError(
                f"{self.path / 'recipe.json'}: lacks values that every run has; remove the folder and train again"
            )
        return value

    def save(self, checkpoint: dict[str, Any], best: dict[str, Any] | None) -> None:
        """Writes the checkpoint, before it the best weights if this epoch brought them, and the history after.

        In this order a kill in between costs nothing: a run resumed from the earlier checkpoint comes by the same best
        weights again, and rewrites the history from its checkpoint.
        """
        if best is not None:
            self._write_checkpoint(self.best, best)
        self._write_checkpoint(self.last, checkpoint)
        self.write_history(checkpoint["history"])

    def _write_checkpoint(self, path: Path, content: dict[str, Any]) -> None:
        # Into memory first: torch reports a failed write as an internal error, and these are some megabytes.
        buffer = io.BytesIO()
        torch.save(content, buffer)
        atomic_write(path, buffer.getvalue())

    def write_history(self, history: list[dict[str, Any]]) -> None:
        """Writes history.jsonl as a whole, unless it holds that already."""
        path, content = self.path / "history.jsonl", "".join(json.dumps(line) + "\n" for line in history).encode()
        if not path.exists() or path.read_bytes() != content:
            atomic_write(path, content)

    def history(self) -> list[dict[str, Any]]:
        """A dictionary per finished epoch; empty before the first.

        Each holds `epoch` (from 1), `train_loss`, `train_accuracy`, `validation_loss`, `validation_accuracy` (shares,
        not per cent), `learning_rate` and `seconds`.
        """
        try:
            lines = (self.path / "history.jsonl").read_text().splitlines()
        except FileNotFoundError:
            return []
        try:
            return [json.loads(line) for line in lines]
        except ValueError as error:
            raise RunError(
                f"{self.path / 'history.jsonl'}: damaged ({error}); go on with --resume, which rewrites it"
            ) from error

    def is_finished(self) -> bool:
        """Whether every epoch of its recipe was trained."""
        return (self.path / "recipe.json").exists() and len(self.history()) == self.description()["recipe"]["epochs"]


def best_epoch(history: list[dict[str, Any]]) -> dict[str, Any]:
    """The epoch of the best validation accuracy; of several, the first."""
    return max(history, key=lambda line: line["validation_accuracy"])


def finished_runs(runs: Path) -> list[RunFolder]:
    """Every finished run below a folder of runs, in the order of recipe and seed."""
    folders = [RunFolder(path.parent) for path in sorted(runs.glob("*/*/recipe.json"))]
    return [folder for folder in folders if folder.is_finished()]


def default_place(data_kind: str, name: str) -> Path:
    """Where runs and exports go unless said: those of generated data to a place of their own, never over real ones."""
    return Path("synthetic", name) if data_kind == "synthetic" else Path(name)
