"""Whether a run may be continued: only with the values, data and weights that it was started with."""

import contextlib
import logging
from pathlib import Path
from typing import Any

from cifar_core.errors import CifarError
from cifar_core.recipe import Recipe, RecipeError, read_recipe
from cifar_core.run_folder import RunError, RunFolder

logger = logging.getLogger(__name__)


def saved_recipe(folder: RunFolder, description: dict[str, Any]) -> Recipe:
    """The recipe of a run.

    Args:
        folder: the run folder, for messages.
        description: the content of its recipe.json.

    Raises:
        RunError: This version cannot read the recipe.
    """
    try:
        return read_recipe(description["recipe"])
    except RecipeError as error:
        raise RunError(f"{folder.path / 'recipe.json'}: {error}") from error


def differences(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """In what two descriptions of runs differ, as in recipe.json and in checkpoints: their keys."""
    same = {
        "recipe": read_recipe(first["recipe"]) == read_recipe(second["recipe"]),
        # The same data may have another name by now; the fingerprint decides.
        "data": first["data"]["fingerprint"] == second["data"]["fingerprint"],
        **{key: first.get(key) == second.get(key) for key in ("seed", "precision", "classes")},
        **{
            key: first.get(key, {}).get("weights") == second.get(key, {}).get("weights")
            for key in ("initial", "teacher")
        },
    }
    return [key for key, equal in same.items() if not equal]


def check_same_run(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Compares two contents of recipe.json; warns if the machine or the number of ranks is another one.

    Args:
        folder: the run folder, for messages.
        before: what the run was started with.
        now: what it would be continued with.

    Raises:
        RunError: They describe different runs, or this version cannot read the recipe.
    """
    try:
        different = differences(before, now)
    except RecipeError as error:
        raise RunError(f"{folder}: {error}") from error
    if different:
        key = different[0]
        was, is_now = before.get(key, "none"), now.get(key, "none")
        if key == "recipe":  # only the values that differ
            was, is_now = _differing_values(read_recipe(was).values(), is_now)
        raise RunError(
            f"{folder}: this run was started with {key} {was}, not {is_now}; resume it with the same values, or choose "
            "another folder with --runs DIR"
        )
    if before.get("environment") != now.get("environment"):
        logger.warning(
            "%s: this run was started on another machine, with other versions or with another number of ranks (%s); "
            "its weights will differ slightly from those of an uninterrupted run",
            folder,
            before.get("environment"),
        )


def _differing_values(one: dict[str, Any], other: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The entries of two dictionaries with the same keys that differ."""
    keys = [key for key in one if one[key] != other[key]]
    return {key: one[key] for key in keys}, {key: other[key] for key in keys}


def runs_from_other_weights(folder: RunFolder, now: dict[str, Any]) -> list[Path]:
    """The runs next to a run that differ from it only in the weights that they start from, or also in the teacher.

    Runs in another precision count too, because another machine may have chosen it. Damaged ones are left out.

    Args:
        folder: the folder of the run, which need not exist.
        now: the content of its recipe.json.
    """
    found = []
    for file in sorted(folder.path.parent.parent.glob(f"*/{folder.path.name}/recipe.json")):
        if file.parent == folder.path:
            continue
        with contextlib.suppress(CifarError, OSError):
            different = differences(RunFolder(file.parent).description(), now)
            if "initial" in different and not {"recipe", "data", "seed", "classes"} & set(different):
                found.append(file.parent)
    return found
