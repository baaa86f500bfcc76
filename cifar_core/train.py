"""Trains a recipe and writes a run folder.

python -m cifar_core.train RECIPE [--seed 0] [--data FOLDER] [--init exported] [--resume]
torchrun --nproc-per-node=N -m cifar_core.train RECIPE …

A signal stops the run after the current step and saves its state; `--resume` continues it.
"""

import argparse
import contextlib
import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from cifar_core.data import Dataset, add_data_argument, class_lines, load_dataset
from cifar_core.device import DEVICES, computes_in_bf16, describe_environment
from cifar_core.distributed import Ranks, join_ranks
from cifar_core.errors import program_name, run_command
from cifar_core.files import path_option
from cifar_core.history import best_epoch
from cifar_core.initial_weights import InitialWeights, read_initial_weights
from cifar_core.recipe import Precision, Recipe
from cifar_core.recipes import KEYS, RECIPES, asked_precision, batch_size_note, get_recipe
from cifar_core.resuming import runs_from_other_weights
from cifar_core.run_folder import RunFolder, default_folder, folder_name
from cifar_core.stop_signal import Interrupted, StopSignal
from cifar_core.teacher import read_teacher
from cifar_core.trainer import Trainer


def run(trainer: Trainer, resume: bool) -> list[dict[str, Any]]:
    """Trains to the end and prints a line per epoch. Returns the history.

    Of several ranks, the first locks the folder and prints.

    Args:
        trainer: the run to train.
        resume: whether to continue a run that was started before.

    Raises:
        RunError: The folder is in use, cannot be written, or holds a run that must not be continued. A finished run may
            be on a read-only file system: nothing is written but a damaged history, with a warning if that fails.
        TrainingError: The loss is not finite, or a checkpoint cannot be written.
        Interrupted: A signal arrived; the state was saved.
    """
    folder, recipe, state, ranks = trainer.folder, trainer.recipe, trainer.state, trainer.ranks
    say = tqdm.write if ranks.is_first else _say_nothing
    finished = ranks.is_first and resume and folder.is_finished()
    writes = ranks.is_first and not finished
    with folder.lock() if writes else contextlib.nullcontext(), StopSignal() as stop:
        trainer.start(resume)
        if state.epoch == recipe.epochs:
            if finished:
                folder.mend_history(state.history)
            say(f"{folder.path}: already finished; {_best_text(state.history, recipe.weights)}")
            return state.history
        environment = describe_environment(trainer.device)
        say(f"{recipe!r}\nseed {trainer.seed}, {trainer.precision} on {environment['device']}, {trainer.dataset.name}")
        if ranks.size > 1:
            say(f"{ranks.size} ranks on {trainer.device.type}, threads per rank: {environment['threads']}")
        if state.epoch or state.step:
            say(f"resuming after epoch {state.epoch}, step {state.step} of {trainer.steps}")
        for line in trainer.epochs(stop):
            seconds = sum(finished["seconds"] for finished in state.history) / state.epoch
            minutes_left = (recipe.epochs - state.epoch) * seconds / 60
            say(
                f"epoch {line['epoch']:2d}/{recipe.epochs}  {line['seconds']:.1f} s  "
                f"training loss {line['train_loss']:.4f} accuracy {line['train_accuracy']:.2%}  "
                f"{_validation_text(line)}({_best_text(state.history, recipe.weights)}; {minutes_left:.0f} min left)"
            )
    say(f"{folder.path}: finished; {_best_text(state.history, recipe.weights)}")
    return state.history


def _say_nothing(text: str) -> None:
    pass


def _validation_text(line: dict[str, Any]) -> str:
    if line["validation_accuracy"] is None:
        return ""
    return f"validation loss {line['validation_loss']:.4f} accuracy {line['validation_accuracy']:.2%}  "


def _best_text(history: list[dict[str, Any]], weights: str) -> str:
    chosen = best_epoch(history, weights)
    if chosen["validation_accuracy"] is None:
        return "validation follows after the last epochs"
    which = "best validation accuracy" if weights == "best" else "validation accuracy"
    return f"{which} {chosen['validation_accuracy']:.2%} at epoch {chosen['epoch']}"


def _untrained_note(trainer: Trainer) -> str | None:
    """Names classes of which all images were held out, which happens to classes of a few images."""
    labels, classes = trainer.dataset.train.labels[trainer.train_indices], trainer.dataset.classes
    counts = torch.bincount(labels, minlength=len(classes))
    none = [name for name, count in zip(classes, counts.tolist(), strict=True) if count == 0]
    if not none:
        return None
    return (
        f"no image is left to train on for {len(none):,} of the {len(classes):,} classes, because all of theirs are "
        f"held out for validation: {', '.join(none[:_NAMED])}{', …' if len(none) > _NAMED else ''}; add images"
    )


def _new_run_note(trainer: Trainer, resume: bool) -> str | None:
    """Names the runs that `--resume` does not continue only because they started from other weights."""
    if not resume or trainer.folder.is_started():
        return None
    others = runs_from_other_weights(trainer.folder, trainer.description())
    if not others:
        return None
    groups: dict[bool, list[Path]] = {True: [], False: []}
    for other in others:
        groups["initial" in RunFolder(other).description()].append(other)
    texts = [_others_text(paths, trained) for trained, paths in groups.items() if paths]
    return f"{trainer.folder.path} is a new run; {'; '.join(texts)}"


def _others_text(others: list[Path], trained: bool) -> str:
    """Says how to continue other runs of the same recipe and seed, which started from trained or from fresh weights."""
    have, one = ("has", "it") if len(others) == 1 else ("have", "one of them")
    start, advice = (
        ("other weights", "give the same weights with --init") if trained else ("fresh weights", "leave --init out")
    )
    return (
        f"{', '.join(map(str, others[:_NAMED]))} {have} the same recipe and seed, but started from {start}: to "
        f"continue {one}, {advice}"
    )


def _print_start(dataset: Dataset, initial: InitialWeights | None, notes: Sequence[str | None]) -> None:
    """Prints what a user should know before the run: what a folder holds, and what is kept of the initial weights."""
    if dataset.kind == "folder":
        sizes = f"{len(dataset.train):,} training images, {len(dataset.test):,} test images"
        print(f"{dataset.name}: {sizes}", *class_lines(dataset), sep="\n")
    if initial is not None:
        head = (
            "all layers"
            if initial.is_for(dataset.classes)
            else f"all layers but the output layer, which is new: the classes were {', '.join(initial.classes)}"
        )
        print(f"starting from {initial.name}: {head}")
    for note in filter(None, notes):
        print(f"note: {note}")


_NAMED = 5
"""Number of classes, or of runs, that a note names."""
_SLOW_BF16 = (
    "the run continues in bf16, in which it was started, but this processor does not compute in bf16: it takes more "
    "than ten times as long as fp32"
)
_FP32_INSTEAD = (
    "this processor does not compute in bf16, so the run is trained in fp32; --precision bf16 trains in bf16 all the "
    "same, and takes more than ten times as long"
)


def _choose_precision(
    arguments: argparse.Namespace, recipe: Recipe, folder: RunFolder, device: torch.device, ranks: Ranks
) -> tuple[Precision, str | None]:
    """The precision to train in, and what to say about it.

    It is what the user asked for; otherwise that of the run to continue; otherwise that of the recipe where the devices
    of all ranks compute in it.
    """
    asked = asked_precision(arguments.precision, arguments.set, recipe)
    # All ranks decide together, also if they were started with different options; `start` refuses those.
    fast = ranks.all(computes_in_bf16(device))
    continued = ranks.from_first(arguments.resume and folder.is_started())
    in_bf16 = continued and ranks.from_first(ranks.is_first and folder.description()["precision"] == "bf16")
    if asked is not None:
        return asked, None
    if continued:
        return ("bf16", None if fast or folder.is_finished() else _SLOW_BF16) if in_bf16 else ("fp32", None)
    if fast or recipe.precision == "fp32":
        return recipe.precision, None
    return "fp32", _FP32_INSTEAD


def add_weights_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds `--init` and `--teacher`, which a sweep has too."""
    parser.add_argument(
        "--init",
        type=path_option,
        metavar="exported|RUN|FILE",
        help="trained weights to start from: the folder of an export, a run folder, an .onnx or a .pt file; with other "
        "classes the output layer is new",
    )
    parser.add_argument(
        "--teacher",
        type=path_option,
        metavar="RUN|exported|FILE",
        help="trained model whose outputs are learned in addition to the labels, for recipes with distillation above 0",
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program_name("cifar_core.train"), description="Trains a recipe and writes a run folder."
    )
    parser.add_argument("recipe", metavar="RECIPE", help=f"name of the recipe: {', '.join(RECIPES)}")
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="seed of the initial weights, the order of the images, augmentation and dropout; default: %(default)s",
    )
    add_data_argument(parser)
    parser.add_argument(
        "--device",
        choices=DEVICES,
        default="auto",
        help="device to train on; default: auto, which is CUDA if available, otherwise the CPU",
    )
    parser.add_argument(
        "--precision",
        choices=("fp32", "bf16"),
        help="precision of training; bf16 is autocast; default: the precision of the run to continue, otherwise that "
        "of the recipe, but fp32 on a processor that does not compute in bf16",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="changes a value of the recipe, for example epochs=5 or sizes=20:4,24:10; may be repeated; "
        f"keys: {', '.join(KEYS)}",
    )
    add_weights_arguments(parser)
    parser.add_argument(
        "--runs",
        type=path_option,
        metavar="DIR",
        help="folder for all runs; the run is written to DIR/RECIPE/SEED, with --init to DIR/RECIPE+init=DIGEST/SEED; "
        "default: runs (synthetic/runs for synthetic data)",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continues the run from its last checkpoint; starts it if it does not exist yet, and does nothing if it "
        "is finished",
    )
    return parser


def main() -> int:
    """Runs the command. Exit codes: 0 finished, 2 error, 128 + n stopped by signal n after saving."""
    parser = _parser()
    arguments = parser.parse_args()
    if not 0 <= arguments.seed < 2**32:
        parser.error(f"--seed {arguments.seed}: the seed must be 0 to {2**32 - 1}")
    logging.basicConfig(format="%(levelname)s: %(message)s")
    recipe = get_recipe(arguments.recipe, arguments.set)
    with join_ranks(arguments.device) as (ranks, device):
        return _train(arguments, recipe, ranks, device)


def _train(arguments: argparse.Namespace, recipe: Recipe, ranks: Ranks, device: torch.device) -> int:
    dataset = ranks.first_then_others(functools.partial(load_dataset, arguments.data))
    runs = arguments.runs or default_folder(dataset.kind, "runs")
    initial = read_initial_weights(arguments.init) if arguments.init else None
    teacher = read_teacher(arguments.teacher, device) if arguments.teacher else None
    folder = RunFolder(runs / folder_name(recipe.name, initial.digest if initial else None) / str(arguments.seed))
    precision, precision_note = _choose_precision(arguments, recipe, folder, device, ranks)
    trainer = Trainer(recipe, dataset, folder, arguments.seed, device, precision, initial, teacher, ranks)
    if ranks.is_first:
        notes = (
            batch_size_note(arguments.recipe, recipe),
            precision_note,
            _untrained_note(trainer),
            _new_run_note(trainer, arguments.resume),
        )
        _print_start(dataset, initial, notes)
    try:
        run(trainer, arguments.resume)
    except Interrupted as interrupted:
        if ranks.is_first:
            print(interrupted)
        return 128 + interrupted.signal_number
    return 0


if __name__ == "__main__":
    run_command(main)
