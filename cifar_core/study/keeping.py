"""Keeping what a report needs of each run: a few kilobytes, without the weights."""

import logging
from collections.abc import Iterable
from pathlib import Path

from cifar_core.files import atomic_write, to_json
from cifar_core.resuming import differences
from cifar_core.run_folder import RunFolder
from cifar_core.study.runs import ReportError, Run, evaluation_file

logger = logging.getLogger(__name__)


def copy_histories(runs: Iterable[Run], target: Path) -> None:
    """Copies recipe.json, history.jsonl and test.json of each run to TARGET/PRECISION/NAME/SEED.

    NAME is that of the run's row in the report, which tells recipe, initial weights and teacher. Another history of the
    same recipe, seed and data that is there already is replaced, and a warning says so.

    Raises:
        ReportError: The folder of a run holds the history of another one.
        RunError: It holds a damaged one.
        FileWriteError: A file cannot be written.
    """
    for run in runs:
        _copy(run, RunFolder(target / run.precision / run.name / str(run.seed)))


def _copy(run: Run, kept: RunFolder) -> None:
    description = (run.folder.path / "recipe.json").read_bytes()
    test = evaluation_file(kept)
    if kept.is_started():
        different = differences(kept.description(), run.folder.description())
        if different:
            raise ReportError(
                f"{kept.path} holds the history of another run than {run.folder.path} (different: "
                f"{', '.join(different)}); remove it, or choose another folder with --keep"
            )
        if kept.history() != run.history:
            logger.warning("%s: the history of an earlier training is replaced by %s", kept.path, run.folder.path)
            test.unlink(missing_ok=True)
    kept.path.mkdir(parents=True, exist_ok=True)
    atomic_write(kept.path / "recipe.json", description)
    kept.write_history(run.history)
    if run.test is not None:
        atomic_write(test, to_json(run.test))
