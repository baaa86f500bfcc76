"""The machine: which device computes, and what it is called in tables."""

import ctypes
import platform
from importlib.metadata import version
from pathlib import Path

import torch

from cifar_core.errors import CifarError

DEVICES = ("auto", "cpu", "cuda")
CPU = torch.device("cpu")


class DeviceError(CifarError):
    """A device that was asked for and is not there."""


def choose_device(name: str) -> torch.device:
    """`auto` takes CUDA where there is one; asked for CUDA by name, nothing else is taken.

    Raises:
        DeviceError: CUDA was asked for and torch finds none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        raise DeviceError(
            f"--device cuda: torch {torch.__version__} ({built}) finds no CUDA device; "
            "check the driver, or use --device cpu"
        )
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def keep_freed_memory() -> None:
    """Makes this process keep the memory it frees, instead of giving it back and asking for it anew every step.

    glibc returns the top of its heap to the system as soon as a training step has freed it; getting it back costs
    thousands of page faults a step, up to a fifth of the base model's time on two cores. What is kept is bounded by
    what was needed at once. Where the C library is another, nothing happens.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        trim_threshold, mmap_threshold, gigabyte = -1, -3, 2**30  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
        libc.mallopt(trim_threshold, gigabyte)
        libc.mallopt(mmap_threshold, gigabyte)


def processor_name() -> str:
    """The CPU's own name where the system tells it, its architecture otherwise."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def describe_environment(device: torch.device) -> dict[str, str | int]:
    """Versions and machine, as they are saved beside a run."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": version("numpy"),
    }
