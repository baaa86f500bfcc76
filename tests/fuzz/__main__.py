"""Runs all targets, one after another, and prints a table; exit code 1 if anything was found."""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.fuzz.targets import TARGETS

_START_SECONDS = 60


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60, help="time for each target (default: 60)")
    parser.add_argument("--seed", type=int, default=1, help="seed of the mutations (default: 1)")
    parser.add_argument("--target", choices=sorted(TARGETS), help="only this target")
    parser.add_argument("--findings", type=Path, help="folder for reports and inputs that were found")
    options = parser.parse_args()
    findings = options.findings or Path(tempfile.mkdtemp(prefix="fuzz-"))
    print(f"{'target':18}{'inputs':>10}{'faults':>8}{'crashes':>9}  slowest input")
    found = 0
    for name in [options.target] if options.target else TARGETS:
        inputs, faults, crashes, slowest = fuzz(name, findings / name, options.seconds, options.seed)
        found += faults + crashes
        print(f"{name:18}{inputs:>10,}{faults:>8}{crashes:>9}  {1000 * slowest:.0f} ms of CPU time", flush=True)
    print(f"inputs and reports are in {findings}")
    return 1 if found else 0


def fuzz(name: str, folder: Path, seconds: float, seed: int) -> tuple[int, int, int, float]:
    """Fuzzes one target, again after each crash: inputs tried, kinds of faults, crashes, seconds of the slowest."""
    end = time.monotonic() + seconds
    inputs, faults, crashes, slowest = 0, set[str](), 0, 0.0
    attempt = 0
    while (remaining := end - time.monotonic()) >= 1:
        report = folder / str(attempt)
        report.mkdir(parents=True)
        with (report / "log").open("w") as log:
            code = subprocess.run(
                [sys.executable, "-m", "tests.fuzz.run", name, str(report), str(int(remaining)), str(seed + attempt)],
                stdout=log, stderr=log, check=False, timeout=remaining + _START_SECONDS,
            ).returncode  # fmt: skip
        if not (report / "report.json").exists():
            raise SystemExit(f"{name}: the fuzzer did not start; see {report / 'log'}")
        result = json.loads((report / "report.json").read_text())
        inputs += result["inputs"]
        slowest = max(slowest, result["slowest_seconds"])
        faults.update(result["faults"])
        crashes += code != 0
        attempt += 1
    return inputs, len(faults), crashes, slowest


if __name__ == "__main__":
    sys.exit(main())
