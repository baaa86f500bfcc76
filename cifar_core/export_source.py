"""The run that is exported: choosing one, and refusing those that cannot be exported."""

from pathlib import Path
from typing import Any

from cifar_core.data import Dataset, split
from cifar_core.device import CPU
from cifar_core.errors import CifarError
from cifar_core.predictors import load_predictor, predict_all
from cifar_core.recipe import RecipeError
from cifar_core.resume_command import resume_command
from cifar_core.resuming import differences, saved_recipe
from cifar_core.run_folder import RunFolder, finished_runs


class ExportError(CifarError):
    """The export failed. The target folder is unchanged."""


def pick_run(runs: Path, dataset: Dataset) -> RunFolder:
    """The finished run with the best accuracy on held-out images that all candidates have in common.

    Recipes hold out different numbers of images, so the accuracies in their histories cannot be compared. Test images
    play no part. Candidates are the finished runs that were trained on this data.

    Raises:
        ExportError: There is no candidate, or there are several that have too few held-out images in common.
        RunError: This version cannot read the recipe of a candidate.
    """
    finished = [run for run in finished_runs(runs) if run.description()["data"]["fingerprint"] == dataset.fingerprint]
    if not finished:
        raise ExportError(
            f"{runs}: there is no finished run on {dataset.name} in this folder; train one with: make train"
        )
    if len(finished) == 1:
        return finished[0]
    recipes = [saved_recipe(run, run.description()) for run in finished]
    held_out = [split(len(dataset.train), recipe.validation_images, recipe.split_seed)[1] for recipe in recipes]
    common = sorted(set.intersection(*(set(indices.tolist()) for indices in held_out)))
    if len(common) < min(len(indices) for indices in held_out) / 2:
        raise ExportError(
            f"{runs}: the {len(finished)} finished runs have only {len(common)} held-out images in common, because "
            "their split_seed differs; choose one with --run DIR"
        )
    images, labels = dataset.train.images[common].numpy(), dataset.train.labels[common].numpy()
    correct = []
    for run in finished:
        logits, _ = predict_all(load_predictor(run.best, CPU), images)
        correct.append(int((logits.argmax(1) == labels).sum()))
        print(f"{run.path}: {correct[-1]:,} of {len(common):,} common held-out images correct")
    return finished[correct.index(max(correct))]


def check_run(run: RunFolder, description: dict[str, Any], dataset: Dataset, data: str | None = None) -> None:
    """Checks that a run is finished and was trained on this data.

    Args:
        run: the run.
        description: the content of its recipe.json.
        dataset: the data.
        data: the value of `--data` that names it, for the message.

    Raises:
        ExportError: It is not, or was not.
    """
    trained_on = description["data"]
    if trained_on["fingerprint"] != dataset.fingerprint:
        raise ExportError(
            f"{run.path} was trained on {trained_on['name']} (fingerprint {trained_on['fingerprint'][:12]}), but "
            f"--data is {dataset.name} ({dataset.fingerprint[:12]}); export it with the data that it was trained on"
        )
    if not run.is_finished():
        raise ExportError(
            f"{run.path}: this run is not finished; continue it with: {resume_command(run.path, description, data)}"
        )


def check_weights(run: RunFolder, checkpoint: dict[str, Any], description: dict[str, Any]) -> None:
    """Checks that the weights of a run were not copied from another run: its held-out images may be others.

    Raises:
        ExportError: They were.
    """
    try:
        different = differences(checkpoint, description)
    except RecipeError as error:
        raise ExportError(f"{run.best}: {error}") from error
    if different:
        raise ExportError(
            f"{run.best}: these weights are not those of this run, but of {checkpoint['recipe'].get('name')}, seed "
            f"{checkpoint['seed']} (different: {', '.join(different)}); put back the file that training wrote, or "
            "train the run again"
        )
