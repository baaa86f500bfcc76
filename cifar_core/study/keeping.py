"""Keeping what a report needs of each run: a few kilobytes, without the weights."""

import contextlib
import logging
from collections.abc import Iterable
from pathlib import Path

from cifar_core.files import atomic_write, to_json
from cifar_core.resuming import differences
from cifar_core.run_folder import RunFolder, folder_name
from cifar_core.study.runs import ReportError, Run, evaluation_file

logger = logging.getLogger(__name__)


def copy_histories(runs: Iterable[Run], target: Path) -> None:
    """Copies recipe.json, history.jsonl and test.json of each run to TARGET/PRECISION/NAME/SEED.

    NAME is that of the run's row in the report, which tells recipe, initial weights and teacher. Another history of the
    same recipe, seed and data that is there already is replaced, and a warning says so. One that was kept before
    names told weights and teacher is moved to its new name.

    Raises:
        ReportError: The folder of a run holds the history of another one.
        RunError: It holds a damaged one.
        FileWriteError: A file cannot be written.
        OSError: A folder cannot be created, moved or removed.
    """
    for run in runs:
        _copy(run, target / run.precision)


def _copy(run: Run, target: Path) -> None:
    kept = RunFolder(target / run.name / str(run.seed))
    content, description = (run.folder.path / "recipe.json").read_bytes(), run.folder.description()
    test = evaluation_file(kept)
    if kept.is_started():
        different = differences(kept.description(), description)
        if different:
            raise ReportError(
                f"{kept.path} holds the history of another run than {run.folder.path} (different: "
                f"{', '.join(different)}); remove it, or choose another folder with --keep"
            )
    for name in _earlier_names(run):
        earlier = RunFolder(target / name / str(run.seed))
        if _is_kept_history(earlier) and not differences(earlier.description(), description):
            _move(earlier, kept)
    if kept.is_started() and kept.history() != run.history:
        logger.warning("%s: the history of an earlier training is replaced by %s", kept.path, run.folder.path)
        test.unlink(missing_ok=True)
    kept.path.mkdir(parents=True, exist_ok=True)
    atomic_write(kept.path / "recipe.json", content)
    kept.write_history(run.history)
    if run.test is not None:
        atomic_write(test, to_json(run.test))


def _earlier_names(run: Run) -> set[str]:
    """Under which names earlier versions kept the run: they told neither weights nor teacher, or only the weights."""
    recipe = run.recipe.name
    return {folder_name(recipe), folder_name(recipe, run.initial["weights"] if run.initial else None)} - {run.name}


def _is_kept_history(folder: RunFolder) -> bool:
    """Whether a folder holds a history without weights; a whole run is never moved or removed."""
    return folder.is_started() and not folder.best.exists() and not folder.last.exists()


def _move(earlier: RunFolder, kept: RunFolder) -> None:
    """Moves a history to its new name; removes it if there is one already, because the run would count twice."""
    logger.warning("%s: this history of the same run, under its earlier name, is now %s", earlier.path, kept.path)
    if kept.is_started():
        for name in ("recipe.json", "history.jsonl", evaluation_file(earlier).name):
            (earlier.path / name).unlink(missing_ok=True)
    else:
        kept.path.parent.mkdir(parents=True, exist_ok=True)
        earlier.path.rename(kept.path)
    with contextlib.suppress(OSError):  # other files or seeds may still be there
        earlier.path.rmdir()
    with contextlib.suppress(OSError):
        earlier.path.parent.rmdir()
