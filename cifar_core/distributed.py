"""One run on several devices: the processes that `torchrun` starts, called ranks, and everything they do together.

torch's DistributedDataParallel averages the gradients; this module adds what it leaves to its users. Every rank holds
the whole network and the same optimizer, and computes its part of each batch. Rank 0 alone writes files and prints.

Without torchrun, or with a single process of it, a process is `ALONE`: no process group exists, and the methods of
`Ranks` return their arguments, so that a run has the same bits as before there were ranks. This module must not depend
on data sets or on training.
"""

import contextlib
import datetime
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cifar_core.device import DeviceError, available_cores, choose_device
from cifar_core.errors import CifarError

TIMEOUT = datetime.timedelta(seconds=45)
"""How long a rank waits for another one in a step. The end of a process is noticed at once, without this."""
PREPARATION_TIMEOUT = datetime.timedelta(hours=6)
"""How long ranks wait while rank 0 downloads data, decodes a folder of images, or computes a teacher's outputs."""
_SMALLEST_NORMALISED = 2
_RUN_ID = "TORCHELASTIC_RUN_ID"
"""Set by torchrun. RANK and WORLD_SIZE alone may also come from a scheduler that starts independent processes."""

Result = TypeVar("Result")


class RankError(CifarError):
    """The ranks cannot train together: one has ended, they have different data, or their parts are too small."""


@dataclass(frozen=True)
class Ranks:
    """The processes that train one run together, as one of them sees them.

    The methods that exchange something must be called by all ranks, in the same order: all but `part`, `part_of_mean`,
    `seed_step` and `check_batch_norm`.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes.
        preparation: group of all ranks in which one waits longer than `TIMEOUT`; None if this process is alone.
    """

    rank: int = 0
    size: int = 1
    preparation: dist.ProcessGroup | None = None

    @property
    def is_first(self) -> bool:
        """Whether this process writes the files and prints."""
        return self.rank == 0

    def first_then_others(self, work: Callable[[], Result]) -> Result:
        """The result of `work`, which rank 0 does before the others, because it may fill a cache that they then read.

        Args:
            work: may take hours.
        """
        if self.size == 1:
            return work()
        if self.is_first:
            result = work()
            dist.barrier(self.preparation)
            return result
        dist.barrier(self.preparation)
        return work()

    def from_first(self, decision: bool) -> bool:
        """What rank 0 decided."""
        return bool(self.total(torch.tensor(int(decision and self.is_first))))

    def all(self, condition: bool) -> bool:
        """Whether a condition holds on all ranks."""
        return self.highest(int(not condition)) == 0

    def wait_for_first(self) -> None:
        """Waits until rank 0 calls this too; for work that only it does, such as writing a file."""
        self.from_first(decision=True)

    def highest(self, number: int) -> int:
        """The highest of the ranks' numbers."""
        if self.size == 1:
            return number
        value = torch.tensor(number)
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return int(value)

    def total(self, values: Tensor) -> Tensor:
        """The sum over all ranks, a new tensor; alone, `values` itself."""
        if self.size == 1:
            return values
        values = values.clone()
        dist.all_reduce(values)
        return values

    def part(self, values: Tensor) -> Tensor:
        """This rank's part of the first dimension. The parts are disjoint, complete, and equal up to one element."""
        return values.tensor_split(self.size)[self.rank]

    def part_of_mean(self, loss: Tensor, count: int, total: int) -> Tensor:
        """What this rank adds to the mean loss of a batch; alone, `loss` itself.

        Args:
            loss: mean loss of this rank's part of the batch, a scalar; NaN if that part is empty.
            count: images in this part. An empty part has gradients of 0, and the rank takes part with them.
            total: images in the whole batch.
        """
        if self.size == 1:
            return loss
        return loss * (count / total) if count else loss.nan_to_num(0.0)

    def backward(self, part_of_mean: Tensor) -> None:
        """Computes the gradients of the mean loss of the whole batch, equal on all ranks.

        DistributedDataParallel divides the sum of the ranks' gradients by their number; the factor undoes that.
        """
        (part_of_mean * self.size).backward()  # type: ignore[no-untyped-call]

    def replicate(self, model: nn.Module, freezes: bool) -> nn.Module:
        """The network whose gradients are averaged over the ranks; alone, `model` itself.

        All ranks continue with the weights of rank 0.

        Args:
            model: keeps its parameters: the result computes with the same ones.
            freezes: whether parameters stop being trained during the run.
        """
        if self.size == 1:
            return model
        device = next(model.parameters()).device
        replica = DistributedDataParallel(
            model,
            device_ids=[device] if device.type == "cuda" else None,
            find_unused_parameters=freezes,
        )
        # Rank 0 need not hand out its buffers in every step: only validation uses them, after `average_statistics`.
        # Newer versions of torch warn about the argument of this name, and older ones do not know its successor.
        replica.broadcast_buffers = False
        return replica

    def average_statistics(self, model: nn.Module) -> None:
        """Gives all ranks the mean of their statistics of batch normalisation.

        In training each rank normalises with the mean and variance of its part of the batch.
        """
        if self.size == 1:
            return
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
                for statistic in (layer.running_mean, layer.running_var):
                    if statistic is not None:
                        dist.all_reduce(statistic)
                        statistic.div_(self.size)

    def seed_step(self, seed: int, step: int) -> None:
        """Gives dropout numbers that differ between ranks; alone, does nothing.

        They depend only on seed, step and rank, so that no checkpoint has to hold the generators of all ranks.
        """
        if self.size > 1:
            sequence = np.random.SeedSequence(seed, spawn_key=(self.rank, step))
            torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0]) % 2**63)

    def check_same_run(self, description: Mapping[str, Any]) -> None:
        """Checks that all ranks train the same run.

        Raises:
            RankError: The descriptions differ.
        """
        digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()
        number = int(digest[:15], 16)
        if self.highest(number) != number or -self.highest(-number) != number:
            raise RankError(
                f"rank {self.rank}: the ranks have different values, data or weights; start all of them with the same "
                "arguments, on machines that have the same data"
            )

    def check_batch_norm(self, smallest_batch: int) -> None:
        """Checks that each rank can normalise its part of a batch.

        Raises:
            RankError: A part would have fewer than two images.
        """
        if self.size > 1 and smallest_batch // self.size < _SMALLEST_NORMALISED:
            raise RankError(
                f"the smallest batch has {smallest_batch} images, {smallest_batch // self.size} for some of the "
                f"{self.size} ranks, but batch normalisation needs at least {_SMALLEST_NORMALISED} for each; start "
                f"at most {max(1, smallest_batch // _SMALLEST_NORMALISED)} ranks with --nproc-per-node, or choose "
                "larger batches with --set batch_size"
            )


ALONE = Ranks()
"""A process that trains by itself."""


def number_of_ranks() -> int:
    """How many processes torchrun started; 1 without torchrun.

    Raises:
        RankError: The environment is not that of torchrun.
    """
    if _RUN_ID not in os.environ:
        return 1
    size = os.environ.get("WORLD_SIZE", "")
    if not size.isdecimal():
        raise RankError(
            f"{_RUN_ID} is set, but WORLD_SIZE is {size!r}; start the ranks with torchrun, or unset {_RUN_ID}"
        )
    return int(size)


@contextlib.contextmanager
def join_ranks(device_name: str) -> Iterator[tuple[Ranks, torch.device]]:
    """Connects the processes of torchrun for the duration of a `with` block; yields them and the device to compute on.

    The processes exchange tensors through gloo, and those on CUDA devices through NCCL. On the CPU each computes with
    an equal share of the cores, unless the user has set OMP_NUM_THREADS.

    Args:
        device_name: a value of `device.DEVICES`.

    Raises:
        DeviceError: The device is not available, or there are fewer CUDA devices than ranks on this machine.
        RankError: Another rank has ended, or did not answer in time.
    """
    device = choose_device(device_name)
    if number_of_ranks() == 1:
        yield ALONE, device
        return
    local_rank, local_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    backend = "gloo"
    if device.type == "cuda":
        device, backend = _cuda_device(local_rank, local_size), "cpu:gloo,cuda:nccl"
    elif not user_chose_threads():
        torch.set_num_threads(max(1, available_cores() // local_size))
    try:
        dist.init_process_group(backend, timeout=TIMEOUT)
        preparation = dist.new_group(backend="gloo", timeout=PREPARATION_TIMEOUT)
        # A process that is not a member of a new group gets a number in place of it; this group has all as members.
        yield Ranks(dist.get_rank(), dist.get_world_size(), preparation), device  # type: ignore[arg-type]
    except RuntimeError as error:
        # gloo has no error class of its own, but all its messages name its source file.
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise RankError(
                f"rank {os.environ['RANK']}: another rank has ended, or did not answer for {TIMEOUT.seconds} s; its "
                "own message says why; with --resume the run continues from its last checkpoint"
            ) from error
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _cuda_device(local_rank: int, local_size: int) -> torch.device:
    """The CUDA device of this rank, which it also makes the default one."""
    count = torch.cuda.device_count()
    if count < local_size:
        raise DeviceError(
            f"--nproc-per-node={local_size}: {local_size} ranks need a CUDA device each, but this machine has {count}; "
            f"start {count} ranks, or use --device cpu"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def user_chose_threads() -> bool:
    """Whether OMP_NUM_THREADS was set when torchrun started.

    torchrun sets it to 1 for its children where it is missing, so only the environment that torchrun itself was
    started with can tell.
    """
    try:
        variables = Path(f"/proc/{os.getppid()}/environ").read_bytes().split(b"\0")
    except OSError:
        return "OMP_NUM_THREADS" in os.environ
    return any(variable.startswith(b"OMP_NUM_THREADS=") for variable in variables)
