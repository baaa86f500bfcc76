"""The run folder, `runs/<name>/<seed>/`: all files that a training run writes and that other code reads.

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
import logging
import os
import pickle
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cifar_core.errors import CifarError
from cifar_core.files import ARCHIVE_ERRORS, FileWriteError, atomic_write, read_regular, to_json
from cifar_core.history import fault, from_lines, to_lines

logger = logging.getLogger(__name__)


class RunError(CifarError):
    """A run folder that is missing, damaged, in use, not writable, or holds a different run."""


class RunInUse(RunError):
    """Another process is training in the folder."""


_ABOUT: dict[str, type] = {"recipe": dict, "seed": int, "classes": list, "data": dict}
"""What recipe.json and every checkpoint hold about the run, with its type in JSON."""
_LONGEST_NAME = 255
"""The longest name of a file or folder, in bytes, that usual file systems allow."""
_DIGITS = 12
CHANGE = re.compile(r"\+(?=[a-z_]+=)")
"""Stands between the changes `key=value` in the name of a recipe; a value may contain a plus too, as 1e+30 does."""


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
    except ARCHIVE_ERRORS as error:
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
        path: `runs/<name>/<seed>`, where the name is that of `folder_name`; the folder need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.best = path / "best.pt"
        self.last = path / "last.pt"
        self._history = path / "history.jsonl"
        self._warned = False

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
        except (ValueError, RecursionError) as error:
            raise RunError(f"{file}: this file is damaged ({error}); remove the folder and train again") from error
        if not isinstance(value, dict) or not _describes_run(value):
            raise RunError(
                f"{file}: this file is incomplete: it must hold recipe (with name and epochs), seed, precision, data "
                "(with name and fingerprint) and classes; remove the folder and train again"
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

    def mend_history(self, history: list[dict[str, Any]]) -> None:
        """Writes history.jsonl of a finished run, whose folder is not locked, if it has another content.

        If it cannot be written, a warning is logged: the run is read from last.pt all the same.
        """
        if self._holds(history):
            return
        try:
            with self.lock():
                self.write_history(history)
        except (RunError, FileWriteError) as error:
            logger.warning("%s: this file cannot be written anew, and is left as it is (%s)", self._history, error)

    def _holds(self, history: list[dict[str, Any]]) -> bool:
        """Whether history.jsonl has this content."""
        return self._history.exists() and self._history.read_bytes() == to_lines(history)

    def write_history(self, history: list[dict[str, Any]]) -> None:
        """Writes history.jsonl, unless it has this content already.

        Raises:
            FileWriteError: The file cannot be written.
        """
        if not self._holds(history):
            atomic_write(self._history, to_lines(history))

    def history(self) -> list[dict[str, Any]]:
        """One dictionary per finished epoch, see `cifar_core.history`; empty before the first.

        If history.jsonl is damaged, or lacks epochs that last.pt holds, this is the history in last.pt, and a warning
        is logged. Every command can thus read such a run, and `--resume` writes the file anew.

        Raises:
            RunError: The file is damaged, and last.pt is missing or damaged as well; or recipe.json is.
        """
        try:
            written = self._history.stat().st_mtime_ns
            content = self._history.read_bytes()
        except FileNotFoundError:
            written, content = 0, b""
        try:
            history = from_lines(content)
        except ValueError as error:
            return self._saved_instead(str(error))
        return self._completed(history, written)

    def _completed(self, history: list[dict[str, Any]], written: int) -> list[dict[str, Any]]:
        """The history in last.pt if it has more epochs than history.jsonl, otherwise this one.

        Args:
            history: what history.jsonl holds.
            written: its time in nanoseconds, from before it was read.
        """
        # A finished run is read without its weights.
        if not self.last.exists() or len(history) >= self.description()["recipe"]["epochs"]:
            return history
        try:
            saved = self._saved_history()
        except RunError:  # the history may still be whole; resuming tells what is wrong with last.pt
            return history
        if saved is None or len(saved) <= len(history):
            return history
        # Training writes last.pt first, so an older history is being written now, or was not because of a kill.
        if written > self.last.stat().st_mtime_ns:
            self._warn(f"{self._history}: this file is damaged (it ends after epoch {len(history)} of {len(saved)})")
        return saved

    def _saved_history(self) -> list[dict[str, Any]] | None:
        """The history in last.pt; None if it holds none.

        Raises:
            RunError: The file is missing or damaged.
        """
        saved = load_checkpoint(self.last).get("history")
        return saved if isinstance(saved, list) and fault(saved) is None else None

    def _saved_instead(self, reason: str) -> list[dict[str, Any]]:
        """The history in last.pt, if history.jsonl cannot be read."""
        damaged = f"{self._history}: this file is damaged ({reason})"
        if not self.last.exists():
            raise RunError(f"{damaged}; put it back, or remove {self.path} and train anew")
        try:
            saved = self._saved_history()
        except RunError as error:
            raise RunError(
                f"{damaged}, and so is {self.last.name}; put one of them back, or remove {self.path} and train anew"
            ) from error
        if saved is None:
            raise RunError(
                f"{damaged}, and {self.last.name} holds no history; put one of them back, or remove {self.path} and "
                "train anew"
            )
        self._warn(damaged)
        return saved

    def _warn(self, damaged: str) -> None:
        if not self._warned:
            logger.warning(
                "%s; the history in %s is used, and training with --resume writes the file anew",
                damaged,
                self.last.name,
            )
            self._warned = True

    def is_started(self) -> bool:
        """Whether the folder holds a run, or a part of one."""
        return any((self.path / name).exists() for name in ("recipe.json", "history.jsonl", "best.pt", "last.pt"))

    def is_finished(self) -> bool:
        """Whether all epochs of the recipe were trained."""
        if not (self.path / "recipe.json").exists():
            return False
        return bool(len(self.history()) == self.description()["recipe"]["epochs"])


def _describes_run(value: dict[str, Any]) -> bool:
    """Whether recipe.json holds what every reader of a run relies on."""
    if not _has_types(value, _ABOUT | {"precision": str}):
        return False
    weights = [value[key] for key in ("initial", "teacher") if key in value]
    return (
        isinstance(value["recipe"].get("name"), str)
        and isinstance(value["recipe"].get("epochs"), int)
        and isinstance(value["data"].get("name"), str)
        and isinstance(value.get("environment", {}), dict)
        and isinstance(value.get("date", ""), str)
        and all(isinstance(each, dict) and isinstance(each.get("weights"), str) for each in weights)
    )


def folder_name(recipe: str, initial: str | None = None, teacher: str | None = None) -> str:
    """The name of the folder that holds the runs of a recipe, one folder per seed.

    Runs that start from trained weights have a folder of their own, next to that of the same recipe from fresh weights.
    A name that is too long for a file system is cut after a whole change and ends with a digest of the whole.

    Args:
        recipe: name of the recipe, with the changes of `--set`.
        initial: digest of the weights that the runs start from, in hexadecimal; None for fresh weights.
        teacher: digest of the teacher, which the name tells only where runs are compared; None leaves it out.
    """
    end = "".join(f"+{key}={digest[:8]}" for key, digest in (("init", initial), ("teacher", teacher)) if digest)
    if len((recipe + end).encode()) <= _LONGEST_NAME:
        return recipe + end
    end = f"+rest={hashlib.sha256(recipe.encode()).hexdigest()[:_DIGITS]}{end}"
    name, *changes = CHANGE.split(recipe)
    for change in changes:
        if len(f"{name}+{change}{end}".encode()) > _LONGEST_NAME:
            break
        name += f"+{change}"
    return name + end


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
