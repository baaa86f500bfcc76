"""The state of a training run, which checkpoints save and restore."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cifar_core.hard_images import HardImages
from cifar_core.models import Network


@dataclass
class TrainState:
    """Everything that changes during training.

    Attributes:
        model: the network.
        optimizer: its optimizer.
        losses: float32 [steps per epoch], on the device: the mean loss of the batch of each step.
        correct: int64 [steps per epoch], on the device: how many images of each step's batch were classified correctly.
        hard_images: chooses the images to train on; None if all are.
        epoch: number of finished epochs.
        step: number of finished steps in the current epoch.
        seconds: time spent on the current epoch so far.
        history: one dictionary per finished epoch, as in history.jsonl.
    """

    model: Network
    optimizer: torch.optim.Optimizer
    losses: Tensor
    correct: Tensor
    hard_images: HardImages | None = None
    epoch: int = 0
    step: int = 0
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self, device: torch.device) -> dict[str, Any]:
        """The state as tensors and plain values, which can be loaded without pickle."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            **({"hard_images": self.hard_images.to_dict()} if self.hard_images else {}),
            "losses": self.losses,
            "correct": self.correct,
            "epoch": self.epoch,
            "step": self.step,
            "seconds": self.seconds,
            "history": self.history,
            # Dropout draws from these generators; the order of the images depends only on seed and epoch.
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        }

    def restore(self, saved: dict[str, Any], device: torch.device) -> None:
        """Restores a state returned by `to_dict`, also one saved before layers had names.

        Raises:
            KeyError, TypeError, ValueError, AttributeError, RuntimeError: It is not a state of such a run.
        """
        counts = (saved["epoch"], saved["step"], len(saved["history"]))
        fits = all(isinstance(count, int) for count in counts) and counts[0] == counts[2]
        if not fits or not 0 <= saved["step"] <= len(self.losses) or saved["losses"].shape != self.losses.shape:
            raise ValueError(f"epoch {counts[0]}, step {counts[1]} and {counts[2]} lines of history")
        self.model.load_weights(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        for parameter, state in self.optimizer.state.items():
            for name, value in state.items():
                if isinstance(value, Tensor) and value.dim() and value.shape != parameter.shape:
                    raise ValueError(
                        f"{name} of shape {list(value.shape)} for weights of shape {list(parameter.shape)}"
                    )
        if self.hard_images:
            self.hard_images.restore(saved["hard_images"])
        self.losses.copy_(saved["losses"])
        self.correct.copy_(saved["correct"])
        self.epoch, self.step, self.seconds = saved["epoch"], saved["step"], saved["seconds"]
        self.history = saved["history"]
        torch.set_rng_state(saved["rng"])
        if device.type == "cuda" and saved["cuda_rng"] is not None:
            torch.cuda.set_rng_state(saved["cuda_rng"], device)
