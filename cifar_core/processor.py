"""What the system says about the processor. Must not import torch."""

import functools
import platform
from pathlib import Path

_CPU_INFO = Path("/proc/cpuinfo")


def processor_name() -> str:
    """The model name of the processor if the system reports it, otherwise its architecture."""
    return _first_core("model name") or platform.machine()


def has_bf16() -> bool:
    """Whether this processor computes in bf16. False if the system does not say which instructions it has."""
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(_instructions())


def has_int8_products() -> bool:
    """Whether this processor adds products of int8 in 32 bits (VNNI, AMX, ARM). False if the system does not say it."""
    return not {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"}.isdisjoint(_instructions())


@functools.cache
def has_matrix_units() -> bool:
    """Whether this processor multiplies matrices of bf16 in units of their own (AMX)."""
    return "amx_bf16" in _instructions()


def _instructions() -> list[str]:
    return (_first_core("flags") or _first_core("Features")).split()  # the latter on ARM


def _first_core(field: str) -> str:
    """What the system reports about the first core; empty if it does not."""
    try:
        lines = _CPU_INFO.read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")
