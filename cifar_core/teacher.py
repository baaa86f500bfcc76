"""Distillation: learning from the outputs of a trained model, which are computed once for all images and kept.

After Hinton et al. 2015, "Distilling the Knowledge in a Neural Network" (arXiv 1503.02531), with a temperature of 1.
"""

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from cifar_core.data import Dataset
from cifar_core.errors import CifarError
from cifar_core.files import ARCHIVE_ERRORS, atomic_write
from cifar_core.held_out import TrainedOn, reason_against
from cifar_core.predictors import Predictor, load_predictor, model_file, predict_all
from cifar_core.recipe import Recipe


class TeacherError(CifarError):
    """A teacher that is missing, not wanted, has other classes than the data, or knows images that are held out."""


@dataclass(frozen=True)
class Teacher:
    """A trained model whose outputs are learned.

    Attributes:
        predictor: the model.
        digest: SHA-256 of its file, in hexadecimal.
    """

    predictor: Predictor
    digest: str

    def description(self) -> dict[str, str]:
        """The entry in recipe.json."""
        return {"name": self.predictor.name, "weights": self.digest}

    def logits(self, images: Tensor, cache: Path) -> Tensor:
        """The teacher's logits, float32 [2, N, classes]: of the images, and of the mirrored images.

        Args:
            images: uint8 [N, 32, 32, 3].
            cache: file that keeps the logits, so that a resumed run does not compute them again.
        """
        kept = self._read(cache, len(images))
        if kept is None:
            pixels = images.numpy()
            views = (pixels, np.ascontiguousarray(pixels[:, :, ::-1]))
            kept = np.stack([predict_all(self.predictor, view)[0] for view in views])
            buffer = io.BytesIO()
            np.savez(buffer, teacher=np.asarray(self.digest), logits=kept)
            atomic_write(cache, buffer.getvalue())
        return torch.from_numpy(kept)

    def _read(self, cache: Path, count: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]] | None:
        try:
            with np.load(cache, allow_pickle=False) as arrays:
                logits = arrays["logits"]
                same = str(arrays["teacher"]) == self.digest and logits.shape[:2] == (2, count)
                return logits if same else None
        except (*ARCHIVE_ERRORS, MemoryError):
            return None  # missing or damaged: it is computed and written anew


def check_teacher(teacher: Teacher | None, recipe: Recipe, dataset: Dataset) -> None:
    """Checks that a recipe can be trained with this teacher.

    Raises:
        TeacherError: The recipe needs a teacher and there is none, or the reverse; the teacher has other classes; or it
            was trained on images that the run holds out.
    """
    if recipe.distillation and teacher is None:
        raise TeacherError(f"{recipe.name} has distillation={recipe.distillation:g}; name a teacher with --teacher RUN")
    if teacher is None:
        return
    if not recipe.distillation:
        raise TeacherError(f"{recipe.name} has no distillation; choose its share with --set distillation=0.5")
    if teacher.predictor.classes != dataset.classes:
        raise TeacherError(
            f"the teacher {teacher.predictor.name} has the classes {', '.join(teacher.predictor.classes)}, but "
            f"{dataset.name} has {', '.join(dataset.classes)}; use a teacher that was trained on these classes"
        )
    model = teacher.predictor
    trained_on = None if model.split is None else TrainedOn(model.trained_on, *model.split)
    if reason := reason_against(f"the teacher {model.name}", trained_on, recipe, dataset):
        raise TeacherError(reason)


def read_teacher(source: Path, device: torch.device) -> Teacher:
    """Reads a teacher.

    Args:
        source: a run folder, an export, a .pt file or an .onnx file.
        device: the device to compute on.

    Raises:
        RunError, PredictorError: The teacher is missing, damaged or not of this project.
    """
    file = model_file(source)
    predictor = load_predictor(file, device)
    return Teacher(predictor, hashlib.sha256(file.read_bytes()).hexdigest())


def distillation_loss(logits: Tensor, teacher: Tensor) -> Tensor:
    """The mean cross-entropy with the teacher's probabilities, a scalar in nats.

    Args:
        logits: float [B, classes].
        teacher: logits of the teacher, float32 [B, classes].
    """
    return nn.functional.cross_entropy(logits, teacher.softmax(1))
