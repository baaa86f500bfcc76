"""The device to compute on, and a description of the machine for tables."""

import ctypes
import os
import platform
from importlib.metadata import version

import torch

from cifar_core.errors import CifarError
from cifar_core.processor import has_bf16, processor_name
from cifar_core.recipe import Precision, Recipe

DEVICES = ("auto", "cpu", "cuda")
CPU = torch.device("cpu")


class DeviceError(CifarError):
    """The requested device is not available."""


def choose_device(name: str) -> torch.device:
    """The device with this name; `auto` means CUDA if it is available, otherwise the CPU.

    Raises:
        DeviceError: `cuda` was requested, and torch finds no CUDA device.
    """
    if name == "cuda" and not torch.cuda.is_available():
        build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        raise DeviceError(
            f"--device cuda: torch {torch.__version__} ({build}) finds no CUDA device; "
            "check the driver, or use --device cpu"
        )
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def computes_in_bf16(device: torch.device) -> bool:
    """Whether a device has instructions for bf16.

    On other processors a step of our recipes takes 14 to 25 times as long in bf16 as in fp32 (AMD EPYC with AVX2).
    """
    return device.type != "cpu" or has_bf16()


def default_precision(recipe: Recipe, device: torch.device) -> Precision:
    """The precision of a recipe, but fp32 instead of bf16 on a device that does not compute in bf16."""
    return recipe.precision if computes_in_bf16(device) else "fp32"


def available_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def keep_freed_memory() -> None:
    """Makes this process keep freed memory instead of returning it to the system and requesting it again every step.

    By default glibc returns the top of its heap to the system as soon as a training step has freed it. Getting it back
    costs thousands of page faults per step, up to a fifth of the base model's training time on two cores. The memory
    kept is at most the peak that was in use. With other C libraries this function does nothing.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        trim_threshold, mmap_threshold, gigabyte = -1, -3, 2**30  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD in malloc.h
        libc.mallopt(trim_threshold, gigabyte)
        libc.mallopt(mmap_threshold, gigabyte)


def describe_environment(device: torch.device) -> dict[str, str | int]:
    """Machine and library versions, as saved with every run."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": version("numpy"),
    }
