"""The run folder, `runs/<recipe>/<seed>/`: all files that a training run writes and that other code reads.

    recipe.json     values of the recipe, seed, precision, data and machine
    history.jsonl   one line per epoch
    best.pt         weights that the run ends with: those of the epoch with the best validation accuracy, or the last
    last.pt         state from which the run can be resumed
    events.*        TensorBoard

Every file is written under another name and then renamed, so that a kill at any moment leaves a usable folder. Files
are read without pickle. This module must not depend on models or data sets.
"""

import fcntl
import hashlib
import io
import json
import os
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cifar_core.errors import CifarError
from cifar_core.files import atomic_write, read_regular, to_json


class RunError(CifarError):
    """A run folder that is missing, damaged, in use, not writable, or holds a different run."""


class RunInUse(RunError):
    """Another process is training in the folder."""


_ABOUT: dict[str, type] = {"recipe": dict, "seed": int, "classes": list, "data": dict}
"""What recipe.json and every checkpoint hold about the run, with its type in JSON."""


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a `.pt` file onto the CPU. Only tensors and plain values are accepted, so that no file can run code.

    Raises:
        RunError: The file is missing, damaged, or holds something other than a checkpoint of this library.
    """
    try:
        content = read_regular(path)
    except FileNotFoundError:
        raise RunError(
            f"{path}: this checkpoint does not exist; train with: python -m cifar_core.train RECIPE"
        ) from None
    except OSError as error:
        raise RunError(f"{path}: this checkpoint cannot be read ({error.strerror}); use another file") from error
    try:
        checkpoint = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # torch's message advises reading the file unsafely
        raise RunError(
            f"{path}: not a checkpoint of this library: it holds more than tensors and plain values, or is damaged; "
            "train again, or use another file"
        ) from error
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RunError(
            f"{path}: not a checkpoint of this library, or a damaged one ({reason}); train again, or use another file"
        ) from error
    if not isinstance(checkpoint, dict) or not _has_types(checkpoint, _ABOUT | {"model": dict, "epoch": int}):
        raise RunError(
            f"{path}: not a checkpoint of this library: it must hold model, epoch, recipe, seed, classes and data; use "
            "another file"
        )
    return checkpoint


def _has_types(value: Mapping[str, Any], types: Mapping[str, type]) -> bool:
    """Whether a dictionary holds values of these types, and `data` a fingerprint."""
    return all(isinstance(value.get(key), kind) for key, kind in types.items()) and isinstance(
        value["data"].get("fingerprint"), str
    )


class RunFolder:
    """The files of one run.

    Args:
        path: `runs/<recipe>/<seed>`; the folder need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.best = path / "best.pt"
        self.last = path / "last.pt"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Creates the folder if necessary, and keeps other processes from training in it.

        Raises:
            RunInUse: Another process is training in it.
            RunError: It cannot be created, or its path is not UTF-8.
        """
        if str(self.path).encode(errors="replace").decode() != str(self.path):  # TensorBoard cannot write there
            raise RunError(f"{os.fsencode(self.path)!r}: this path is not UTF-8; choose another with --runs DIR")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            stream = (self.path / ".lock").open("w")
        except OSError as error:
            raise RunError(
                f"{self.path}: this folder cannot be written to ({error.strerror}); choose another with --runs DIR"
            ) from error
        with stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunInUse(
                    f"{self.path}: another process is training in this folder; wait for it, or choose another --seed"
                ) from None
            yield

    def write_description(self, description: dict[str, Any]) -> None:
        """Writes recipe.json.

        Raises:
            FileWriteError: The file cannot be written.
        """
        atomic_write(self.path / "recipe.json", to_json(description))

    def description(self) -> dict[str, Any]:
        """The content of recipe.json.

        It holds `recipe`, `seed`, `precision`, `data`, `classes`, `environment` and `date` (UTC, when the run started).
        `recipes.read_recipe` reads its `recipe`, which may have been written by an earlier version.

        Raises:
            RunError: The file is missing or damaged.
        """
        file = self.path / "recipe.json"
        try:
            value = json.loads(file.read_bytes())
        except FileNotFoundError:
            if self.is_started():
                raise RunError(
                    f"{file}: this file of the run is missing; put it back, or remove {self.path} and train anew"
                ) from None
            raise RunError(
                f"{self.path}: not a run folder, because it has no recipe.json; train a run, or use another folder"
            ) from None
        except ValueError as error:
            raise RunError(f"{file}: this file is damaged ({error}); remove the folder and train again") from error
        if not isinstance(value, dict) or not _has_types(value, _ABOUT | {"precision": str}):
            raise RunError(
                f"{file}: this file is incomplete: it must hold recipe, seed, precision, data and classes; "
                "remove the folder and train again"
            )
        return value

    def save(self, checkpoint: dict[str, Any], best: dict[str, Any] | None) -> None:
        """Writes best.pt if this epoch has the best weights so far, then last.pt, then the history.

        A kill between these writes loses nothing: a run resumed from the earlier checkpoint computes the same best
        weights again, and rewrites the history from its checkpoint.

        Raises:
            FileWriteError: A file cannot be written; its previous content is unchanged.
        """
        if best is not None:
            self._write_checkpoint(self.best, best)
        self._write_checkpoint(self.last, checkpoint)
        self.write_history(checkpoint["history"])

    def _write_checkpoint(self, path: Path, content: dict[str, Any]) -> None:
        # Into memory first, a few megabytes: torch reports a failed write to a file as an internal error.
        buffer = io.BytesIO()
        torch.save(content, buffer)
        atomic_write(path, buffer.getvalue())

    def write_history(self, history: list[dict[str, Any]]) -> None:
        """Writes history.jsonl, unless it has this content already.

        Raises:
            FileWriteError: The file cannot be written.
        """
        path, content = self.path / "history.jsonl", "".join(json.dumps(line) + "\n" for line in history).encode()
        if not path.exists() or path.read_bytes() != content:
            atomic_write(path, content)

    def history(self) -> list[dict[str, Any]]:
        """One dictionary per finished epoch; empty before the first.

        Each holds `epoch` (from 1), `train_loss`, `train_accuracy`, `validation_loss`, `validation_accuracy`
        (accuracies from 0 to 1; both are None if the recipe did not validate the epoch), `learning_rate` and `seconds`.

        Raises:
            RunError: The file is damaged.
        """
        file = self.path / "history.jsonl"
        try:
            lines = file.read_text().splitlines()
        except FileNotFoundError:
            return []
        try:
            history = [json.loads(line) for line in lines]
            fault = None if all(isinstance(line, dict) and "epoch" in line for line in history) else "not of epochs"
        except ValueError as error:
            fault = str(error)
        if fault is not None:
            resumable = "resuming the run with --resume rewrites it"
            way = resumable if self.last.exists() else f"put it back, or remove {self.path} and train anew"
            raise RunError(f"{file}: this file is damaged ({fault}); {way}")
        return history

    def is_started(self) -> bool:
        """Whether the folder holds a run, or a part of one."""
        return any((self.path / name).exists() for name in ("recipe.json", "history.jsonl", "best.pt", "last.pt"))

    def is_finished(self) -> bool:
        """Whether all epochs of the recipe were trained."""
        if not (self.path / "recipe.json").exists():
            return False
        return bool(len(self.history()) == self.description()["recipe"]["epochs"])


def best_epoch(history: list[dict[str, Any]], weights: str) -> dict[str, Any]:
    """The line of the epoch whose weights a run ends with.

    Args:
        history: the lines of at least one epoch.
        weights: the recipe's `weights`: `best` is the epoch with the best validation accuracy, the first of several;
            `last` is the last epoch.
    """
    return history[-1] if weights == "last" else max(history, key=lambda line: line["validation_accuracy"])


def finished_runs(runs: Path) -> list[RunFolder]:
    """Every finished run in a folder of runs, ordered by recipe and seed."""
    folders = [RunFolder(path.parent) for path in sorted(runs.glob("*/*/recipe.json"))]
    return [folder for folder in folders if folder.is_finished()]


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names and values of a network's tensors, in hexadecimal."""
    digest = hashlib.sha256()
    for name, tensor in state.items():
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def default_folder(data_kind: str, name: str) -> Path:
    """The default folder for runs or exports; below synthetic/ for synthetic data, so that real ones are safe."""
    return Path("synthetic", name) if data_kind == "synthetic" else Path(name)
