"""Fuzzes one target for some seconds: `python -m tests.fuzz.run TARGET REPORT SECONDS SEED`.

Writes into the folder REPORT: `report.json`, and each input that broke a promise, or crashed this process. libFuzzer
ends the process at the end and at a crash, so the report is written while it runs. Pillow's C code is not instrumented;
coverage of its Python code and of ours guides, and structure-aware mutations reach the C code.
"""

import hashlib
import json
import random
import sys
import time
import traceback
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["PIL", "cifar_core.images", "service.core.decode_checks", "service.rpc"]):
    from tests.fuzz.targets import TARGETS
from tests.fuzz.mutations import mutate

MAX_INPUT_BYTES = 200_000
SECONDS_PER_INPUT = 10
MEMORY_MIB = 2500
_REPORT_SECONDS = 0.5


class Recorder:
    """Calls a target's function and notes what happened."""

    def __init__(self, name: str, folder: Path) -> None:
        self._check = TARGETS[name].make()
        self._folder = folder
        self._inputs = 0
        self._slowest = 0.0
        self._faults: dict[str, str] = {}
        self._written = 0.0

    def __call__(self, data: bytes) -> None:
        began = time.thread_time()
        try:
            self._check(data)
        except Exception as error:  # noqa: BLE001 -- what is looked for; the next input is tried
            self._note_fault(error, data)
        took = time.thread_time() - began
        self._inputs += 1
        if took > self._slowest:
            self._slowest = took
            (self._folder / "slowest.bin").write_bytes(data)
        if time.monotonic() - self._written > _REPORT_SECONDS:
            self._write()

    def _note_fault(self, error: Exception, data: bytes) -> None:
        last = traceback.extract_tb(error.__traceback__)[-1]
        lines = str(error).strip().splitlines() or [""]
        place = f"{type(error).__name__} in {last.name}: {lines[-1]}"[:200]
        if place not in self._faults:
            name = f"fault-{hashlib.sha256(data).hexdigest()[:12]}.bin"
            (self._folder / name).write_bytes(data)
            self._faults[place] = name
            self._write()

    def _write(self) -> None:
        self._written = time.monotonic()
        report = {"inputs": self._inputs, "slowest_seconds": self._slowest, "faults": self._faults}
        (self._folder / "report.json").write_text(json.dumps(report))


def main(name: str, report: str, seconds: str, seed: str) -> None:
    """See the module."""
    folder = Path(report)
    corpus = folder / "seeds"
    corpus.mkdir(parents=True, exist_ok=True)
    seeds = TARGETS[name].seeds()
    for index, content in enumerate(seeds):
        (corpus / f"{index:03d}").write_bytes(content)

    def mutator(data: bytes, max_size: int, number: int) -> bytes:
        generator = random.Random(number)

        def mutate_bytes(part: bytes) -> bytes:
            return bytes(atheris.Mutate(part, min(len(part) + 64, max_size)))

        return mutate(bytes(data), seeds, generator, mutate_bytes)[:max_size]

    options = {
        "max_total_time": seconds, "seed": seed, "max_len": MAX_INPUT_BYTES, "timeout": SECONDS_PER_INPUT,
        "rss_limit_mb": MEMORY_MIB, "detect_leaks": 0, "verbosity": 0, "artifact_prefix": f"{folder}/crash-",
    }  # fmt: skip
    arguments = [sys.argv[0], *(f"-{key}={value}" for key, value in options.items()), str(corpus)]
    atheris.Setup(arguments, Recorder(name, folder), custom_mutator=mutator)
    atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
