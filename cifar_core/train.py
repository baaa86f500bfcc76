"""The training loop: step, log, validate, checkpoint, resume.

    python -m cifar_core.train RECIPE [--seed 0] [--resume]

Reads a recipe and a data set, writes a run folder, and knows nothing of export. A run's weights depend on recipe, seed,
data and precision alone: an interrupted and resumed run ends, on the same machine's CPU in fp32, with the same bits as
one that ran through.
"""

import argparse
import contextlib
import dataclasses
import datetime
import logging
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from cifar_core.augmentation import Augmentation, resized
from cifar_core.data import (
    Batches,
    Dataset,
    Images,
    add_data_argument,
    epoch_generator,
    load_dataset,
    split,
    subset_sampler,
    weighted_sampler,
)
from cifar_core.device import DEVICES, choose_device, describe_environment, keep_freed_memory
from cifar_core.errors import CifarError, run_command
from cifar_core.models import IMAGE_SIZE, WhitenedConvNet, make_model
from cifar_core.optimizers import make_optimizer, set_learning_rate
from cifar_core.recipes import RECIPES, Recipe, completed, get_recipe
from cifar_core.run_folder import RunError, RunFolder, best_epoch, default_place, load_checkpoint

logger = logging.getLogger(__name__)

Precision = Literal["fp32", "bf16"]
LOG_EVERY = 200  # steps: the study's own (1.3.1)
VALIDATION_BATCH = 500
WHITENING_IMAGES = 5000


class TrainingError(CifarError):
    """Training cannot go on: the loss is not finite."""


class Interrupted(CifarError):
    """Training was stopped by a signal, after its state was saved."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number


@dataclass
class Training:
    """Everything that changes while training, and so everything that a checkpoint holds.

    Attributes:
        epoch: finished epochs.
        step: finished steps of the epoch under way.
        losses: float32 [steps of an epoch], on the device: the mean loss of each step's batch.
        correct: int64 [steps of an epoch], on the device: how many of each step's batch were classified rightly.
        seconds: spent on the epoch under way.
        history: a line per finished epoch.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    losses: Tensor
    correct: Tensor
    epoch: int = 0
    step: int = 0
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)

    def state(self, device: torch.device) -> dict[str, Any]:
        """Tensors and plain values only, so that it can be read back without pickle."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "losses": self.losses,
            "correct": self.correct,
            "epoch": self.epoch,
            "step": self.step,
            "seconds": self.seconds,
            "history": self.history,
            # Dropout draws from these; the order of the images depends on seed and epoch alone.
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        }

    def restore(self, state: dict[str, Any], device: torch.device) -> None:
        """Takes up a state as `state` gave it."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.losses.copy_(state["losses"])
        self.correct.copy_(state["correct"])
        self.epoch, self.step, self.seconds = state["epoch"], state["step"], state["seconds"]
        self.history = state["history"]
        torch.set_rng_state(state["rng"])
        if device.type == "cuda" and state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"], device)


class StopSignal:
    """Notes the first SIGINT or SIGTERM, so that the step under way can finish; a second one acts as it always does."""

    def __init__(self) -> None:
        self.number: int | None = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        for each, handler in self._before.items():
            signal.signal(each, handler)

    def __enter__(self) -> "StopSignal":
        self._before = {each: signal.signal(each, self._note) for each in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for each, handler in self._before.items():
            signal.signal(each, handler)


@torch.inference_mode()
def validate(model: nn.Module, data: Images) -> tuple[float, float]:
    """Mean cross-entropy and accuracy, in fp32 whatever the precision of training: it is fp32 that is exported."""
    was_training = model.training
    model.eval()
    loss = torch.zeros((), dtype=torch.float64)
    correct = 0
    for first in range(0, len(data), VALIDATION_BATCH):
        labels = data.labels[first : first + VALIDATION_BATCH]
        logits = model(data.images[first : first + VALIDATION_BATCH])
        loss += nn.functional.cross_entropy(logits, labels, reduction="sum").cpu()
        correct += int((logits.argmax(1) == labels).sum())
    model.train(was_training)
    return float(loss) / len(data), correct / len(data)


class Trainer:
    """One run of one recipe.

    Args:
        recipe: what to train.
        dataset: on what.
        folder: where to save; its lock must be held.
        seed: of the weights, the order of the images and dropout.
        device: where to compute; all images are put there.
        precision: fp32, or bf16 autocast (weights, optimizer and validation stay in fp32).
    """

    def __init__(
        self, recipe: Recipe, dataset: Dataset, folder: RunFolder, seed: int, device: torch.device, precision: Precision
    ) -> None:
        self.recipe, self.dataset, self.folder, self.seed = recipe, dataset, folder, seed
        self.device, self.precision = device, precision
        if device.type == "cpu":
            keep_freed_memory()
        self.indices, held_out = split(len(dataset.train), recipe.validation_images, recipe.split_seed)
        self.validation = Images(dataset.train.images[held_out], dataset.train.labels[held_out]).to(device)
        self.train_data = dataset.train.to(device)
        self.steps = -(-len(self.indices) // recipe.batch_size)
        torch.manual_seed(seed)
        model = make_model(recipe.model, len(dataset.classes), recipe.dropout, recipe.width)
        # Channels-last is how the images come, and the faster layout on CPUs and GPUs alike.
        self.model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        if isinstance(self.model, WhitenedConvNet):
            self.model.whiten(self.train_data.images[self.indices[:WHITENING_IMAGES].to(device)])
        optimizer = make_optimizer(recipe, self.model)
        losses, correct = (
            torch.zeros(self.steps, device=device),
            torch.zeros(self.steps, dtype=torch.int64, device=device),
        )
        self.training = Training(self.model, optimizer, losses, correct)
        self._augmented: Augmentation | None = None

    def description(self) -> dict[str, Any]:
        """What recipe.json holds."""
        data = {"kind": self.dataset.kind, "name": self.dataset.name, "fingerprint": self.dataset.fingerprint}
        return {
            "recipe": dataclasses.asdict(self.recipe),
            "seed": self.seed,
            "precision": self.precision,
            "data": data,
            "classes": list(self.dataset.classes),
            "environment": describe_environment(self.device),
        }

    def start(self, resume: bool) -> None:
        """Begins the run, or takes it up where its last checkpoint stands.

        Raises:
            RunError: there is something to take up and `resume` was not given, or it is another run's.
        """
        if not (self.folder.path / "recipe.json").exists():
            today = datetime.datetime.now(datetime.UTC).date().isoformat()
            self.folder.write_description(self.description() | {"date": today})
            return
        if not resume:
            raise RunError(
                f"{self.folder.path}: this run was begun before; go on with --resume, "
                "or to train it anew remove the folder or choose another --seed or --runs DIR"
            )
        self._check_same_run(self.folder.description())
        if self.folder.last.exists():
            self.training.restore(load_checkpoint(self.folder.last), self.device)
            self.folder.write_history(self.training.history)

    def _check_same_run(self, before: dict[str, Any]) -> None:
        now = self.description()
        for key in ("recipe", "seed", "precision", "classes", "data"):
            # The same data may lie elsewhere by now, under another name: its fingerprint decides.
            if key == "data":
                same = before[key]["fingerprint"] == now[key]["fingerprint"]
            elif key == "recipe":
                same = completed(before[key]) == now[key]
            else:
                same = before[key] == now[key]
            if not same:
                raise RunError(
                    f"{self.folder.path}: was begun with {key} {before[key]}, not {now[key]}; give the same again, "
                    "or choose another place with --runs DIR"
                )
        if before.get("environment") != now["environment"]:
            logger.warning(
                "%s: was begun elsewhere (%s); its last bits will differ", self.folder.path, before.get("environment")
            )

    def batches(self) -> Batches:
        """What is left of the epoch under way, in its order."""
        generator = epoch_generator(self.seed, self.training.epoch)
        if self.recipe.sampler == "weighted":
            sampler = weighted_sampler(self.indices, len(self.train_data), generator)
        else:
            sampler = subset_sampler(self.indices, generator)  # type: ignore[assignment]
        return Batches(
            self.train_data, sampler, self.recipe.batch_size, start=self.training.step, augment=self._augmentation()
        )

    def _augmentation(self) -> Callable[[Tensor], Tensor] | None:
        """What gives the images of the epoch under way; None where they are taken as they are."""
        recipe, epoch = self.recipe, self.training.epoch
        size = recipe.image_size(epoch)
        if recipe.flip == "none" and not recipe.translate and not recipe.cutout and size == IMAGE_SIZE:
            return None
        if self._augmented is None or self._augmented.size != (size, size):
            share = size / IMAGE_SIZE
            self._augmented = Augmentation(
                resized(self.train_data.images, size),
                self.seed,
                recipe.flip,
                round(recipe.translate * share),
                round(recipe.cutout * share),
            )
        self._augmented.start_epoch(epoch)
        return self._augmented.batch

    def train_step(self, images: Tensor, labels: Tensor) -> None:
        """One step of SGD on a batch; the loss stays on the device, so that no step waits for it."""
        training, recipe = self.training, self.recipe
        steps = training.epoch * self.steps + training.step
        set_learning_rate(training.optimizer, recipe, (steps + 0.5) / (recipe.epochs * self.steps))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            logits = self.model(images)
            loss = nn.functional.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing)
        training.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        training.optimizer.step()
        training.losses[training.step] = loss.detach()
        training.correct[training.step] = (logits.argmax(1) == labels).sum()
        training.step += 1

    def _check_finite(self) -> None:
        """Raises if a loss of this epoch, or a weight, is not finite."""
        training = self.training
        bad = (~training.losses[: training.step].isfinite()).nonzero()
        weights_finite = all(bool(parameter.isfinite().all()) for parameter in self.model.parameters())
        if len(bad) or not weights_finite:
            step = int(bad[0]) + 1 if len(bad) else training.step
            kept = (
                f"the checkpoint in {self.folder.path} is from before"
                if self.folder.last.exists()
                else "no checkpoint was written yet"
            )
            what = f"the loss is {float(training.losses[step - 1])}" if len(bad) else "a weight is not finite"
            raise TrainingError(
                f"{what} at epoch {training.epoch + 1}, step {step} of {self.steps}, "
                f"learning rate {self.recipe.learning_rate}; {kept}; "
                f"try a lower one: --set learning_rate={self.recipe.learning_rate / 10:g}"
            )

    def window(self, first: int, last: int) -> tuple[float, float]:
        """Mean loss and accuracy over the steps from `first` up to and without `last` of this epoch."""
        sizes = torch.full((self.steps,), self.recipe.batch_size, dtype=torch.float64)
        sizes[-1] = len(self.indices) - (self.steps - 1) * self.recipe.batch_size
        sizes = sizes[first:last]
        losses, correct = self.training.losses[first:last].cpu().double(), self.training.correct[first:last].cpu()
        return float((losses * sizes).sum() / sizes.sum()), float(correct.sum() / sizes.sum())

    def _checkpoint(self) -> dict[str, Any]:
        description = self.description()
        about = {key: description[key] for key in ("recipe", "seed", "precision", "classes", "data")}
        return about | self.training.state(self.device)

    def finish_epoch(self) -> dict[str, Any]:
        """Validates, adds to the history and saves. Returns the new line of the history."""
        training, started = self.training, time.perf_counter()
        self._check_finite()
        train_loss, train_accuracy = self.window(0, self.steps)
        validation_loss, validation_accuracy = validate(self.model, self.validation)
        line = {
            "epoch": training.epoch + 1,
            "train_loss": train_loss,
            "train_accuracy": train_accuracy,
            "validation_loss": validation_loss,
            "validation_accuracy": validation_accuracy,
            "learning_rate": training.optimizer.param_groups[0]["lr"],
            "seconds": round(training.seconds + time.perf_counter() - started, 3),
        }
        training.history.append(line)
        training.epoch, training.step, training.seconds = training.epoch + 1, 0, 0.0
        checkpoint = self._checkpoint()
        best = None
        if best_epoch(training.history) is line:
            keys = ("recipe", "seed", "precision", "classes", "data", "model", "epoch")
            best = {key: checkpoint[key] for key in keys} | {"validation_accuracy": validation_accuracy}
        self.folder.save(checkpoint, best)
        return line

    def interrupt(self, signal_number: int) -> Interrupted:
        """Saves in mid-epoch. Returns the exception that says how to go on."""
        self._check_finite()
        self.folder.save(self._checkpoint(), None)
        training = self.training
        return Interrupted(
            f"stopped by {signal.Signals(signal_number).name} after epoch {training.epoch}, "
            f"step {training.step} of {self.steps}, and saved; go on with the same command and --resume",
            signal_number,
        )

    def epochs(self, stop: StopSignal) -> Iterator[dict[str, Any]]:
        """Trains to the end, yielding the history's line after each epoch.

        Raises:
            TrainingError: the loss is not finite.
            Interrupted: a signal came; the state is saved.
            RunError: the state cannot be saved; the one before is intact.
        """
        training = self.training
        total = self.recipe.epochs * self.steps
        done = training.epoch * self.steps + training.step
        events = SummaryWriter(str(self.folder.path), purge_step=done)
        # disable=None: no bar where nobody watches, such as a log file.
        with contextlib.closing(events), tqdm(total=total, initial=done, unit="step", disable=None) as bar:
            self.model.train()
            while training.epoch < self.recipe.epochs:
                started = time.perf_counter() - training.seconds
                for images, labels in self.batches():
                    self.train_step(images, labels)
                    training.seconds = time.perf_counter() - started
                    bar.update()
                    if training.step % LOG_EVERY == 0:
                        self._log_steps(events)
                    if stop.number is not None:
                        raise self.interrupt(stop.number)
                line = self.finish_epoch()
                for key in ("train_loss", "train_accuracy", "validation_loss", "validation_accuracy", "learning_rate"):
                    events.add_scalar(f"epoch/{key}", line[key], training.epoch * self.steps)
                yield line
                if stop.number is not None and training.epoch < self.recipe.epochs:
                    raise self.interrupt(stop.number)

    def _log_steps(self, events: SummaryWriter) -> None:
        self._check_finite()
        training = self.training
        loss, accuracy = self.window(training.step - LOG_EVERY, training.step)
        tqdm.write(
            f"epoch {training.epoch + 1:2d}  step {training.step:5d}/{self.steps}  "
            f"training loss {loss:.4f}  training accuracy {accuracy:7.2%}"
        )
        step = training.epoch * self.steps + training.step
        events.add_scalar("step/train_loss", loss, step)
        events.add_scalar("step/train_accuracy", accuracy, step)


def _best_text(history: list[dict[str, Any]]) -> str:
    best = best_epoch(history)
    return f"best validation accuracy {best['validation_accuracy']:.2%} at epoch {best['epoch']}"


def run(trainer: Trainer, resume: bool) -> list[dict[str, Any]]:
    """Trains a recipe in its folder from where it stands to the end, printing each epoch. Returns the history."""
    folder, recipe = trainer.folder, trainer.recipe
    with folder.lock(), StopSignal() as stop:
        trainer.start(resume)
        training = trainer.training
        if training.epoch == recipe.epochs:
            print(f"{folder.path}: finished before; {_best_text(training.history)}")
            return training.history
        machine = describe_environment(trainer.device)["device"]
        print(f"{recipe}\nseed {trainer.seed}, {trainer.precision} on {machine}, {trainer.dataset.name}")
        if training.epoch or training.step:
            print(f"resuming after epoch {training.epoch}, step {training.step} of {trainer.steps}")
        for line in trainer.epochs(stop):
            left = (recipe.epochs - training.epoch) * sum(each["seconds"] for each in training.history) / training.epoch
            tqdm.write(
                f"epoch {line['epoch']:2d}/{recipe.epochs}  {line['seconds']:.1f} s  "
                f"training loss {line['train_loss']:.4f} accuracy {line['train_accuracy']:.2%}  "
                f"validation loss {line['validation_loss']:.4f} accuracy {line['validation_accuracy']:.2%}  "
                f"({_best_text(training.history)}; {left / 60:.0f} min left)"
            )
    print(f"{folder.path}: finished; {_best_text(training.history)}")
    return training.history


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cifar_core.train", description="Trains a recipe into a run folder."
    )
    parser.add_argument("recipe", metavar="RECIPE", help=f"one of: {', '.join(RECIPES)}")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and dropout; default: %(default)s")
    add_data_argument(parser)
    parser.add_argument("--device", choices=DEVICES, default="auto", help="default: CUDA where there is one")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="bf16 is autocast; default: the recipe's")
    parser.add_argument(
        "--set", action="append", metavar="KEY=VALUE", help="another value for one of the recipe's keys; repeatable"
    )
    parser.add_argument(
        "--runs",
        type=Path,
        metavar="DIR",
        help="where run folders lie; default: runs (synthetic/runs for generated data)",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on where the run stopped, begin it if it never began, leave it if finished",
    )
    return parser


def main() -> int:
    """The command line. Exit codes: 0 finished, 2 cannot be done, 128 + n stopped by signal n after saving."""
    parser = _parser()
    arguments = parser.parse_args()
    if not 0 <= arguments.seed < 2**32:
        parser.error(f"--seed {arguments.seed}: must be 0 to {2**32 - 1}")
    logging.basicConfig(format="%(levelname)s: %(message)s")
    recipe = get_recipe(arguments.recipe, arguments.set)
    device = choose_device(arguments.device)
    dataset = load_dataset(arguments.data)
    runs = arguments.runs or default_place(dataset.kind, "runs")
    folder = RunFolder(runs / recipe.name / str(arguments.seed))
    trainer = Trainer(recipe, dataset, folder, arguments.seed, device, arguments.precision or recipe.precision)
    try:
        run(trainer, arguments.resume)
    except Interrupted as interrupted:
        print(interrupted)
        return 128 + interrupted.signal_number
    return 0


if __name__ == "__main__":
    run_command(main)
