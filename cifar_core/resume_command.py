"""The command that continues a run, for messages of other commands."""

import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cifar_core.run_folder import CHANGE, default_folder, folder_name


def resume_command(run: Path, description: Mapping[str, Any], data: str | None = None) -> str:
    """The command line that continues a run which was stopped.

    It can be given to a shell as it is, unless the run started from trained weights or has a teacher, or the path of a
    folder of images is unknown: a run records no paths, so words in capitals stand for them.

    Args:
        run: the run folder, `runs/<recipe>/<seed>`. If it has another path, the command first moves it to such a one.
        description: the content of its recipe.json.
        data: the value of `--data` by which its data can be found; None if the option is not needed, or unknown.
    """
    recipe, seed, kind = description["recipe"]["name"], description["seed"], description["data"]["kind"]
    name, *changes = CHANGE.split(recipe)
    words = ["python", "-m", "cifar_core.train", name]
    for change in changes:
        words += ["--set", change]
    words += ["--seed", str(seed)] if seed else []
    words += _data_words(description["data"], data)
    initial, teacher = description.get("initial"), description.get("teacher")
    own_name = folder_name(recipe, initial["weights"] if initial else None)
    runs, move = _place(run, Path(own_name, str(seed)))
    words += ["--runs", str(runs)] if Path(runs).absolute() != default_folder(kind, "runs").absolute() else []
    words += ["--init", "WEIGHTS"] if initial else []
    words += ["--teacher", "TEACHER"] if teacher else []
    stands_for = [
        f"{word}: {about['name']}" for word, about in (("WEIGHTS", initial), ("TEACHER", teacher)) if about is not None
    ]
    return move + shlex.join([*words, "--resume"]) + (f" ({'; '.join(stands_for)})" if stands_for else "")


def _data_words(about: Mapping[str, Any], data: str | None) -> list[str]:
    synthetic = re.fullmatch(r"synthetic, (\d+) images", about.get("name", ""))
    if data is not None:
        return ["--data", data]
    if about["kind"] == "synthetic" and synthetic:
        return ["--data", f"synthetic:{synthetic[1]}"]
    if about["kind"] == "folder" and not os.environ.get("CIFAR10_DATA"):
        return ["--data", "FOLDER"]
    return []


def _place(run: Path, name: Path) -> tuple[Path, str]:
    """The folder for `--runs`, and the commands that move the run to its name in there, if it has another path."""
    path = run.absolute()
    if path.parts[-2:] == name.parts:
        return (run.parent.parent if len(run.parts) > len(name.parts) else path.parent.parent), ""
    words = (["mkdir", "-p", str(path.parent / name.parent)], ["mv", str(path), str(path.parent / name)])
    return path.parent, "".join(f"{shlex.join(each)} && " for each in words)
