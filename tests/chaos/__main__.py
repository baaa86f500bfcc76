"""The command line: runs the chaos and prints its figures."""

import argparse
import secrets
import sys
import tempfile
import time
from pathlib import Path

from tabulate import tabulate

from benchmarks.processes import memory
from service.launch import ServerProcess
from tests.attacks.failing_processes import WORKERS
from tests.attacks.observers import REPOSITORY, MemoryWatch
from tests.chaos.clients import Clients
from tests.chaos.faults import Faults, Files

GROWTH = 1.10
QUIET_SECONDS = 10.0
REST_TRIES = 4
WARM_UP_SECONDS = 60.0


def resting_memory(server: ServerProcess, clients: Clients) -> float:
    """Memory of the server's processes in MiB while no client asks, once it has stopped falling."""
    clients.pause()
    time.sleep(QUIET_SECONDS)
    held = memory(server.process.pid)
    for _ in range(REST_TRIES):
        time.sleep(QUIET_SECONDS)
        before, held = held, memory(server.process.pid)
        if held > 0.98 * before:
            break
    clients.resume()
    return held


def warm_up(faults: Faults, seconds: float) -> None:
    """Load with some attacks and another model, so that what is allocated once is allocated."""
    end = time.monotonic() + seconds
    for name in ("rapid reset", "stalled messages of 8 MiB", "16-bit PNG", "a message of empty images"):
        faults.start_attack(name)
        faults.wait_for_attacks()
    faults.change_model()
    time.sleep(max(0.0, end - time.monotonic()))


def run(server: ServerProcess, files: Files, clients: Clients, arguments: argparse.Namespace) -> bool:
    """Warm-up, faults until the time is over, and the table; whether every promise held."""
    faults = Faults(server, files, clients, arguments.seed)
    warm_up(faults, min(WARM_UP_SECONDS, arguments.seconds / 4))
    beginning = resting_memory(server, clients)
    began = time.monotonic()
    with MemoryWatch(server.process.pid) as watch:
        while (elapsed := time.monotonic() - began) < arguments.seconds and server.process.poll() is None:
            print(f"{elapsed:6.1f} s  {faults.next()}", file=sys.stderr, flush=True)
            time.sleep(1.0)
    faults.wait_for_attacks()
    end = resting_memory(server, clients) if server.process.poll() is None else float("nan")
    clients.stop()
    code = server.stop()
    seen = clients.outcomes
    rows = [
        ("seconds", f"{time.monotonic() - began:.0f}", "", True),
        ("calls answered rightly", f"{seen.calls:,}", "", seen.calls > 0),
        ("images in them", f"{seen.images:,}", "", True),
        ("wrong or mixed answers", seen.wrong, "0", seen.wrong == 0),
        ("lost calls", seen.lost.total(), "0", not seen.lost),
        ("slowest call with its retries, s", f"{seen.slowest:.1f}", "", True),
        ("image files by version", dict(seen.versions), "", True),
        ("memory at the beginning, MiB", f"{beginning:.0f}", "", True),
        ("memory at the peak, MiB", f"{watch.peak:.0f}", "", True),
        ("memory at the end, MiB", f"{end:.0f}", f"≤ {GROWTH * beginning:.0f}", end <= GROWTH * beginning),
        # Includes the time that the new worker needs to start under this load; `make attacks` measures it without load.
        ("slowest replacement of a worker, s", f"{faults.slowest_replacement:.1f}", "", True),
        ("exit code after SIGTERM", code, "0", code == 0),
        ("other broken promises", "; ".join(faults.failures) or "none", "none", not faults.failures),
    ]
    print(
        tabulate([(*row[:3], "yes" if row[3] else "NO") for row in rows], ("", "measured", "limit", "holds"), "github")
    )
    print()
    print(tabulate(sorted(faults.done.items()), ("fault", "times"), "github"))
    for reason, count in seen.lost.most_common(20):
        print(f"lost: {count} x {reason}", file=sys.stderr)
    return all(row[3] for row in rows)


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description="Full load while everything else fails; exit code 1 if a promise broke."
    )
    parser.add_argument("--seconds", type=float, default=600, help="of faults, after a warm-up; default: %(default)s")
    parser.add_argument("--clients", type=int, default=50, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the schedule of faults; default: %(default)s")
    parser.add_argument("--checkout", type=Path, default=REPOSITORY, help="folder whose server is run; default: this")
    parser.add_argument("--log", type=Path, help="file for the server's log")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        files, token = Files(Path(folder)), secrets.token_urlsafe()
        files.write_tokens(token)
        server = ServerProcess(
            "--workers", str(WORKERS), "--model", files.model, "--tls-cert", files.certificate, "--tls-key", files.key,
            "--token-file", files.tokens, folder=arguments.checkout,
        )  # fmt: skip
        try:
            server.ready()
            holds = run(server, files, Clients(server.target, files.ca, token, arguments.clients), arguments)
        finally:
            server.kill()
            if arguments.log:
                arguments.log.write_text(server.log)
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
