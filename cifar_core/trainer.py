"""The training loop: steps, logging, validation, checkpoints, resuming.

The weights of a run depend only on recipe, seed, data and precision: on the CPU of the same machine in fp32, a run that
was interrupted and resumed ends with the same bits as an uninterrupted one.
"""

import datetime
import functools
import signal
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cifar_core.data import Dataset, Images, batch_sizes, split
from cifar_core.device import describe_environment, keep_freed_memory
from cifar_core.distributed import ALONE, RankError, Ranks
from cifar_core.epoch_batches import EpochBatches
from cifar_core.errors import CifarError
from cifar_core.files import FileWriteError
from cifar_core.hard_images import HardImages, trained_images
from cifar_core.history import best_epoch
from cifar_core.initial_weights import InitialWeights, check_initial_weights, start_from
from cifar_core.models import Network, WhitenedConvNet
from cifar_core.optimizers import make_optimizer, muon_dtype, set_learning_rate
from cifar_core.passes import recompute_statistics, validate
from cifar_core.recipe import Precision, Recipe
from cifar_core.resuming import check_same_run
from cifar_core.run_folder import RunError, RunFolder, load_checkpoint
from cifar_core.run_log import RunLog
from cifar_core.stop_signal import Interrupted, StopSignal
from cifar_core.teacher import Teacher, check_teacher, distillation_loss
from cifar_core.train_state import TrainState

LOG_EVERY = 200
"""Steps between two log lines, as in the study (section 1.3.1)."""
WHITENING_IMAGES = 5000
"""Number of random training images from which the whitening filters are computed."""


class TrainingError(CifarError):
    """Training cannot continue: the loss is not finite, or a checkpoint cannot be written."""


class Trainer:
    """One run of one recipe.

    Args:
        recipe: what to train.
        dataset: the data to train on.
        folder: the run folder, whose lock must be held while training; by rank 0 if there are several.
        seed: seed of the initial weights, the order of the images, augmentation and dropout.
        device: the device to compute on; all images are copied to it.
        precision: fp32, or bf16 for autocast; weights, optimizer and validation are in fp32 in both.
        initial: trained weights to start from; None for fresh weights.
        teacher: the model whose outputs are learned in addition to the labels; required if the recipe has
            `distillation`, and None otherwise.
        ranks: the processes that train this run together; each has a trainer with the same arguments.

    Raises:
        InitialWeightsError: The initial weights do not fit the recipe, or were trained on images that the run holds
            out.
        RankError: The batches are too small for batch normalisation on so many ranks, or the recipe trains on the
            hardest images only, for which there must be one rank.
        TeacherError: There is a teacher and no `distillation`, or the reverse; or the teacher has other classes, or
            was trained on images that the run holds out.
    """

    def __init__(
        self,
        recipe: Recipe,
        dataset: Dataset,
        folder: RunFolder,
        seed: int,
        device: torch.device,
        precision: Precision,
        initial: InitialWeights | None = None,
        teacher: Teacher | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.recipe, self.dataset, self.folder, self.seed = recipe, dataset, folder, seed
        self.device, self.precision, self.initial, self.ranks = device, precision, initial, ranks
        check_teacher(teacher, recipe, dataset)
        if initial is not None and not folder.is_started():  # earlier versions started such runs
            check_initial_weights(initial, recipe, dataset)
        self.teacher = teacher
        if device.type == "cpu":
            keep_freed_memory()
        self.train_indices, validation_indices = split(len(dataset.train), recipe.validation_images, recipe.split_seed)
        self.validation = Images(dataset.train.images[validation_indices], dataset.train.labels[validation_indices]).to(
            device
        )
        self.train_data = dataset.train.to(device)
        self.batch_sizes = batch_sizes(len(self.train_indices), recipe.batch_size, even=recipe.batch_norm)
        self.trained_sizes = [trained_images(recipe, size) for size in self.batch_sizes]
        self.steps = len(self.batch_sizes)
        if recipe.hard_share < 1 and ranks.size > 1:
            raise RankError(
                f"hard_share is {recipe.hard_share:g}, which needs one process; {ranks.size} were started: start the "
                "command without torchrun, or use --set hard_share=1"
            )
        if recipe.batch_norm:
            ranks.check_batch_norm(min(self.batch_sizes))
        self.model = self._make_model()
        self._replica = ranks.replicate(self.model, freezes=recipe.whiten_bias_epochs > 0)
        # Ranks that compute differently would end with different weights.
        muon = torch.bfloat16 if ranks.all(muon_dtype(device) == torch.bfloat16) else torch.float32
        self.state = TrainState(
            self.model,
            make_optimizer(recipe, self.model, muon),
            losses=torch.zeros(self.steps, device=device),
            correct=torch.zeros(self.steps, dtype=torch.int64, device=device),
            hard_images=self._make_hard_images(),
        )
        self.epoch_batches = EpochBatches(recipe, seed, self.train_data, self.train_indices, ranks.part)

    def _make_model(self) -> Network:
        recipe = self.recipe
        torch.manual_seed(self.seed)
        model = recipe.make_model(len(self.dataset.classes))
        # The images are channels-last already, and on CPUs and GPUs it is the faster layout.
        model.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        if isinstance(model, WhitenedConvNet):
            model.init_whiten(self._random_training_images(WHITENING_IMAGES))
        if self.initial is not None:
            start_from(self.initial, model, self.dataset.classes, self._random_training_images(WHITENING_IMAGES))
        return model

    def _make_hard_images(self) -> HardImages | None:
        if self.recipe.hard_share == 1:
            return None
        sample = self._random_training_images(WHITENING_IMAGES)
        return HardImages(self.recipe, len(self.dataset.classes), sample, self.precision == "bf16")

    def _random_training_images(self, count: int) -> Tensor:
        """At most `count` of the images to train on, uint8 [N, 32, 32, 3]; the same ones whenever a seed is used.

        A folder is ordered by class, so its first images would be nearly all of one class.
        """
        order = np.random.RandomState(self.seed).permutation(len(self.train_indices))[:count]
        return self.train_data.images[self.train_indices[torch.from_numpy(order)].to(self.device)]

    def description(self) -> dict[str, Any]:
        """The content of recipe.json."""
        data = {"kind": self.dataset.kind, "name": self.dataset.name, "fingerprint": self.dataset.fingerprint}
        return {
            "recipe": self.recipe.values(),
            "seed": self.seed,
            "precision": self.precision,
            "data": data,
            "classes": list(self.dataset.classes),
            "environment": describe_environment(self.device)
            | ({"ranks": self.ranks.size} if self.ranks.size > 1 else {}),
            **({"initial": self.initial.description()} if self.initial else {}),
            **({"teacher": self.teacher.description()} if self.teacher else {}),
        }

    # Starting and resuming

    def start(self, resume: bool) -> None:
        """Starts the run, or restores its last checkpoint.

        Raises:
            RunError: The folder holds a run and `resume` is false, or it holds a different run, or its checkpoint is
                not a state of this run.
            RankError: The ranks were started with different values or data.
        """
        self.ranks.check_same_run({key: value for key, value in self.description().items() if key != "environment"})
        if not self.ranks.from_first(self.ranks.is_first and self._open_folder(resume)):
            return
        if self.ranks.from_first(self.ranks.is_first and not self.folder.last.exists()):  # removed after the last epoch
            self._check_file(self.folder.best)
            self.state.history, self.state.epoch = self.folder.history(), self.recipe.epochs
            return
        self._restore(load_checkpoint(self.folder.last))
        if self.state.epoch == self.recipe.epochs:  # nothing is written: the folder is not locked
            self._check_file(self.folder.best)
        elif self.ranks.is_first:
            self.folder.write_history(self.state.history)
        else:  # the checkpoint holds the sums over all ranks, and rank 0 continues them
            self.state.losses.zero_()
            self.state.correct.zero_()

    def _restore(self, saved: dict[str, Any]) -> None:
        try:
            check_same_run(
                self.folder.last, saved | {"environment": self.description()["environment"]}, self.description()
            )
            self.state.restore(saved, self.device)
        except (CifarError, torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            reason = str(error).splitlines()[0] if str(error) else ""
            raise RunError(
                f"{self.folder.last}: this is not a state of this run ({type(error).__name__}: {reason}); put the file "
                f"back that training wrote, or remove {self.folder.path} and train anew"
            ) from error

    def _open_folder(self, resume: bool) -> bool:
        """Writes recipe.json, or compares it with this run. Returns whether epochs of this run were saved before."""
        if not self.folder.is_started():
            today = datetime.datetime.now(datetime.UTC).date().isoformat()
            self.folder.write_description(self.description() | {"date": today})
            return False
        if not resume:
            raise RunError(
                f"{self.folder.path}: this folder holds a run already; continue it with --resume, or train anew after "
                "removing the folder, or with another --seed or --runs DIR"
            )
        check_same_run(self.folder.path, self.folder.description(), self.description())
        if self.folder.last.exists() or self.folder.is_finished():
            return True
        # A kill within the first save leaves best.pt alone.
        if self.folder.history() or (self.folder.best.exists() and load_checkpoint(self.folder.best)["epoch"] > 1):
            self._check_file(self.folder.last)
        return False

    def _check_file(self, file: Path) -> None:
        if not file.exists():
            raise RunError(
                f"{file}: this file of the run is missing; put it back, or remove {self.folder.path} and train anew"
            )

    # Steps

    def batches(self) -> Iterable[tuple[Tensor, ...]]:
        """The remaining batches of the current epoch; see `EpochBatches.remaining`.

        All ranks draw the same order, and each yields its part of every batch.
        """
        return self.epoch_batches.remaining(self.state.epoch, self.state.step)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def train_step(self, images: Tensor, labels: Tensor, teacher: Tensor | None = None) -> None:
        """One optimizer step on a batch. The loss stays on the device, so that no step waits for a copy.

        With several ranks, these are the parts of one rank.

        Args:
            images: uint8 [B, H, W, 3].
            labels: int64 [B].
            teacher: logits of the teacher, float32 [B, classes]; None without a teacher.
        """
        state, recipe = self.state, self.recipe
        steps_done, all_steps = state.epoch * self.steps + state.step, recipe.epochs * self.steps
        set_learning_rate(state.optimizer, recipe, (steps_done + 0.5) / all_steps)
        if state.hard_images:
            hardest = state.hard_images.choose(images, labels, steps_done, all_steps)
            images, labels = images[hardest], labels[hardest]
            teacher = None if teacher is None else teacher[hardest]
        self.ranks.seed_step(self.seed, steps_done)
        with self._autocast():
            logits = self._replica(images)
            loss = nn.functional.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing)
            if teacher is not None:
                loss = loss.lerp(distillation_loss(logits, teacher), recipe.distillation)
        loss = self.ranks.part_of_mean(loss, len(labels), self.batch_sizes[state.step])
        state.optimizer.zero_grad()
        self.ranks.backward(loss)
        state.optimizer.step()
        state.losses[state.step] = loss.detach()
        state.correct[state.step] = (logits.argmax(1) == labels).sum()
        state.step += 1

    def epochs(self, stop: StopSignal) -> Iterator[dict[str, Any]]:
        """Trains to the end; yields the new line of the history after each epoch.

        Raises:
            TrainingError: The loss is not finite, or a checkpoint cannot be written; the previous one is unchanged.
            Interrupted: A signal arrived; the state was saved.
        """
        state = self.state
        total = self.recipe.epochs * self.steps
        done = state.epoch * self.steps + state.step
        with RunLog(self.folder.path, total, done, enabled=self.ranks.is_first) as log:
            self.model.train()
            while state.epoch < self.recipe.epochs:
                started = time.perf_counter() - state.seconds
                self._start_epoch()
                for batch in self.batches():
                    self.train_step(*batch)
                    state.seconds = time.perf_counter() - started
                    log.step()
                    if state.step % LOG_EVERY == 0:
                        self._log_steps(log)
                    self._check_signal(stop)
                line = self.finish_epoch()
                keys = ("train_loss", "train_accuracy", "validation_loss", "validation_accuracy", "learning_rate")
                log.scalars("epoch", {key: line[key] for key in keys}, state.epoch * self.steps)
                yield line
                if state.epoch < self.recipe.epochs:
                    self._check_signal(stop)

    def _check_signal(self, stop: StopSignal) -> None:
        """Saves and raises Interrupted if a signal arrived; on all ranks after the same step."""
        number = self.ranks.highest(stop.number or 0)
        if number:
            raise self.interrupt(number)

    def _start_epoch(self) -> None:
        """Freezes a whitening bias that is trained no longer; computes the teacher's outputs if they are missing."""
        bias = self.model.whiten.bias if isinstance(self.model, WhitenedConvNet) else None
        if bias is not None and self.state.epoch >= self.recipe.whiten_bias_epochs:
            bias.requires_grad_(False)
            bias.grad = None
        if self.teacher is not None and self.epoch_batches.teacher_logits is None:
            logits = functools.partial(self.teacher.logits, self.dataset.train.images, self.folder.path / "teacher.npz")
            with self._autocast():
                self.epoch_batches.teacher_logits = self.ranks.first_then_others(logits).to(self.device)

    def _log_steps(self, log: RunLog) -> None:
        self._check_finite()
        state = self.state
        loss, accuracy = self.training_metrics(state.step - LOG_EVERY, state.step)
        log.line(
            f"epoch {state.epoch + 1:2d}  step {state.step:5d}/{self.steps}  "
            f"training loss {loss:.4f}  training accuracy {accuracy:7.2%}"
        )
        step = state.epoch * self.steps + state.step
        log.scalars("step", {"train_loss": loss, "train_accuracy": accuracy}, step)

    def training_metrics(self, first: int, last: int) -> tuple[float, float]:
        """Mean loss and accuracy of the images trained on in the steps `first` to `last` - 1 of the current epoch."""
        sizes = torch.tensor(self.trained_sizes[first:last], dtype=torch.float64)
        losses = self.ranks.total(self.state.losses[first:last]).cpu().double()
        correct = self.ranks.total(self.state.correct[first:last]).cpu()
        return float((losses * sizes).sum() / sizes.sum()), float(correct.sum() / sizes.sum())

    def _check_finite(self) -> None:
        """Raises TrainingError if a loss of the current epoch, or a weight, is not finite."""
        state = self.state
        losses = self.ranks.total(state.losses[: state.step])
        bad_steps = (~losses.isfinite()).nonzero()
        weights_finite = all(bool(parameter.isfinite().all()) for parameter in self.model.parameters())
        weights_finite = weights_finite and (state.hard_images is None or state.hard_images.is_finite())
        if not len(bad_steps) and weights_finite:
            return
        step = int(bad_steps[0]) + 1 if len(bad_steps) else state.step
        what = f"the loss is {float(losses[step - 1])}" if len(bad_steps) else "a weight is not finite"
        checkpoint = (
            f"the last checkpoint in {self.folder.path} is from before this"
            if self.folder.last.exists()
            else "no checkpoint has been written yet"
        )
        raise TrainingError(
            f"{what} at epoch {state.epoch + 1}, step {step} of {self.steps}, "
            f"learning rate {self.recipe.learning_rate}; {checkpoint}; "
            f"try a lower learning rate: --set learning_rate={self.recipe.learning_rate / 10:g}"
        )

    # Saving

    def finish_epoch(self) -> dict[str, Any]:
        """Validates, extends the history and saves. Returns the new line of the history."""
        state, recipe, started = self.state, self.recipe, time.perf_counter()
        self._check_finite()
        train_loss, train_accuracy = self.training_metrics(0, self.steps)
        if recipe.statistics_images and state.epoch == recipe.epochs - 1:
            recompute_statistics(self.model, self._random_training_images(recipe.statistics_images))
        self.ranks.average_statistics(self.model)
        validation_loss, validation_accuracy = None, None
        if recipe.is_validated(state.epoch):
            validation_loss, validation_accuracy = validate(self.model, self.validation, self.ranks)
        line = {
            "epoch": state.epoch + 1,
            "train_loss": train_loss,
            "train_accuracy": train_accuracy,
            "validation_loss": validation_loss,
            "validation_accuracy": validation_accuracy,
            "learning_rate": state.optimizer.param_groups[0]["lr"],
            "seconds": round(state.seconds + time.perf_counter() - started, 3),
        }
        state.history.append(line)
        state.epoch, state.step, state.seconds = state.epoch + 1, 0, 0.0
        self._save(is_best=best_epoch(state.history, recipe.weights) is line)
        return line

    def interrupt(self, signal_number: int) -> Interrupted:
        """Saves in the middle of an epoch. Returns the exception that says how to continue."""
        self._check_finite()
        self.ranks.average_statistics(self.model)
        self._save(is_best=False)
        return Interrupted(
            f"stopped by {signal.Signals(signal_number).name} after epoch {self.state.epoch}, "
            f"step {self.state.step} of {self.steps}; the state is saved: continue with the same command and --resume",
            signal_number,
        )

    def _save(self, is_best: bool) -> None:
        description = self.description()
        keys = ("recipe", "seed", "precision", "classes", "data", "initial", "teacher")
        about = {key: description[key] for key in keys if key in description}
        totals = {"losses": self.ranks.total(self.state.losses), "correct": self.ranks.total(self.state.correct)}
        if not self.ranks.is_first:
            self.ranks.wait_for_first()
            return
        checkpoint = about | self.state.to_dict(self.device) | totals
        best = None
        if is_best:
            accuracy = self.state.history[-1]["validation_accuracy"]
            best = about | {key: checkpoint[key] for key in ("model", "epoch")} | {"validation_accuracy": accuracy}
        try:
            self.folder.save(checkpoint, best)
        except FileWriteError as error:
            raise TrainingError(f"{error}; with --resume the run continues from its last checkpoint") from error
        self.ranks.wait_for_first()
