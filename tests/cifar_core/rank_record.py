"""Trains under torchrun and records what each rank saw and ended with: FOLDER RECIPE DATA KEY=VALUE…

FOLDER/RANK.pt holds `weights`, the state dict at the end, and `images`, for each epoch a list of the hashes of the
images of each step. `train_step` is wrapped, and rank 0 alone finds a processor that computes in bf16; everything else
is what the command does.
"""

import hashlib
import sys
from pathlib import Path

import torch

from cifar_core import processor
from cifar_core.data import load_dataset
from cifar_core.distributed import join_ranks
from cifar_core.recipes import get_recipe
from cifar_core.run_folder import RunFolder
from cifar_core.train import run
from cifar_core.trainer import Trainer


def main():
    folder, recipe_name, data, *overrides = sys.argv[1:]
    recipe = get_recipe(recipe_name, overrides)
    with join_ranks("cpu") as (ranks, device):
        info = Path(folder, f"{ranks.rank}.cpuinfo")
        info.write_text(f"flags\t: avx2 {'' if ranks.rank else 'avx512_bf16'}\n")
        processor._CPU_INFO = info
        dataset = load_dataset(data)
        trainer = Trainer(recipe, dataset, RunFolder(Path(folder, "run")), 0, device, "fp32", ranks=ranks)
        names = {hash_of(image): row for row, image in enumerate(dataset.train.images)}
        seen = [[] for _ in range(recipe.epochs)]
        train_step = trainer.train_step

        def recorded(images, labels):
            seen[trainer.state.epoch].append([names.get(hash_of(image), -1) for image in images])
            train_step(images, labels)

        trainer.train_step = recorded
        run(trainer, resume=False)
        torch.save({"weights": trainer.model.state_dict(), "images": seen}, Path(folder, f"{ranks.rank}.pt"))


def hash_of(image):
    return hashlib.sha256(image.numpy().tobytes()).hexdigest()


if __name__ == "__main__":
    main()
