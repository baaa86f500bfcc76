"""What is done to the server: each method of `Faults` is one fault, and undoes what does not heal by itself."""

import multiprocessing
import os
import random
import resource
import secrets
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import trustme

from service.launch import ServerProcess
from tests.attacks.catalogue import ATTACKS
from tests.attacks.failing_processes import NO_MORE_FILES, WORKERS, serving_starts, workers
from tests.attacks.http2 import Target
from tests.chaos.clients import SEEDS, Clients
from tests.service import exports

REPLACE_SECONDS = 30.0
# The server looks at its files every second, and each worker for itself.
NOTICE_SECONDS = 4.0
ATTACKS_AT_ONCE = 2


class Files:
    """The files of the server: model, tokens, certificate."""

    def __init__(self, folder: Path) -> None:
        self.model = folder / "exported"
        self.tokens, self.ca = folder / "tokens", folder / "ca.pem"
        self.certificate, self.key = folder / "server.pem", folder / "server-key.pem"
        self._authority = trustme.CA()
        self._authority.cert_pem.write_to_path(str(self.ca))
        self.renew_certificate()
        self._graphs = {version: exports.graph(seed) for version, seed in SEEDS.items()}
        self.write_model("first")

    def renew_certificate(self) -> None:
        """Writes a new certificate and key of the same authority, the key first."""
        leaf = self._authority.issue_cert("localhost", "127.0.0.1")
        _replace(self.key, leaf.private_key_pem.bytes())
        _replace(self.certificate, b"".join(blob.bytes() for blob in leaf.cert_chain_pems))

    def write_tokens(self, *tokens: str) -> None:
        """The tokens that are valid."""
        _replace(self.tokens, "".join(f"{token}\n" for token in tokens).encode())

    def write_model(self, version: str) -> None:
        """A good export."""
        exports.write_export(self.model, self._graphs[version], version)

    def damage_model(self, choice: random.Random) -> None:
        """A damaged export; the server must go on with the one that it has."""
        graph = self._graphs["first"]
        match choice.randrange(3):
            case 0:
                _replace(self.model / "model.onnx", graph[: len(graph) // 2])
                _touch(self.model / "manifest.json")
            case 1:
                _replace(self.model / "manifest.json", b'{"schema_version": 1, ')
            case _:
                exports.write_export(self.model, choice.randbytes(5000), "damaged")


def _replace(path: Path, content: bytes) -> None:
    new = path.with_name(path.name + ".new")
    new.write_bytes(content)
    new.replace(path)


def _touch(path: Path) -> None:
    if path.exists():
        path.touch()


def attack(name: str, target: Target) -> None:
    """Runs an attack of the catalogue; in a process of its own, so that it does not slow the clients' threads."""
    os.environ["no_grpc_proxy"] = "127.0.0.1,localhost"  # noqa: SIM112 -- gRPC reads small letters only
    ATTACKS[name](target)


class Faults:
    """Faults that a seed chooses.

    Attributes:
        done: How often each was done.
        slowest_replacement: Seconds until a stopped or killed worker was replaced, at most.
        failures: Promises that were broken, in words.
    """

    def __init__(self, server: ServerProcess, files: Files, clients: Clients, seed: int) -> None:
        self.done: Counter[str] = Counter()
        self.slowest_replacement = 0.0
        self.failures: list[str] = []
        self._server, self._files, self._clients = server, files, clients
        self._choice = random.Random(seed)
        self._attacks: list[tuple[str, multiprocessing.context.SpawnProcess]] = []
        # What does each fault and says whether it could be done, and how often it is chosen.
        self._faults: dict[str, tuple[Callable[[], bool], int]] = {
            "attack": (self.start_attack, 12),
            "worker killed": (self.kill_worker, 2),
            "worker stopped": (self.stop_worker, 2),
            "worker starved of file descriptors": (self.starve_worker, 2),
            "worker killed while the supervisor has no file descriptors": (self.starve_supervisor, 1),
            "good export": (self.change_model, 3),
            "damaged export": (self.damage_model, 2),
            "token renewed": (self.renew_token, 2),
            "certificate renewed": (self.renew_certificate, 2),
        }

    def next(self) -> str:
        """Does one fault; its name, or why it was left out."""
        names = list(self._faults)
        weights = [weight for _, weight in self._faults.values()]
        name = self._choice.choices(names, weights)[0]
        if not self._faults[name][0]():
            return f"{name}: left out, because another has not ended"
        if name != "attack":  # each is counted by its own name
            self.done[name] += 1
        return name

    def _wait_until_replaced(self, worker: psutil.Process, starts: int) -> None:
        began = time.monotonic()
        while worker in workers(self._server) or serving_starts(self._server) == starts:
            if time.monotonic() > began + REPLACE_SECONDS:
                self.failures.append(f"worker {worker.pid} was not replaced within {REPLACE_SECONDS:g} s")
                return
            time.sleep(0.05)
        self.slowest_replacement = max(self.slowest_replacement, time.monotonic() - began)

    def _any_worker(self) -> psutil.Process | None:
        alive = sorted(workers(self._server), key=lambda worker: worker.pid)
        # The next fault waits until both work, so that there is always one that the clients can reach.
        return self._choice.choice(alive) if len(alive) == WORKERS else None

    def kill_worker(self) -> bool:
        """SIGKILL, SIGSEGV or a real-time signal, for which Python has no name."""
        number = self._choice.choice((signal.SIGKILL, signal.SIGSEGV, 40))
        worker = self._any_worker()
        if worker:
            starts = serving_starts(self._server)
            worker.send_signal(number)
            self._wait_until_replaced(worker, starts)
        return worker is not None

    def stop_worker(self) -> bool:
        """SIGSTOP: the process exists and does nothing."""
        worker = self._any_worker()
        if worker:
            starts = serving_starts(self._server)
            worker.suspend()
            self._wait_until_replaced(worker, starts)
        return worker is not None

    def starve_worker(self) -> bool:
        """A worker can open no file and accept no connection for two seconds."""
        worker = self._any_worker()
        if worker:
            with suppress(psutil.NoSuchProcess):
                self._starve(worker, lambda: time.sleep(2))
        return worker is not None

    def starve_supervisor(self) -> bool:
        """The supervisor can start no process for three seconds, while a worker is killed."""
        worker = self._any_worker()
        if worker:

            def kill() -> None:
                worker.kill()
                time.sleep(3)

            starts = serving_starts(self._server)
            self._starve(psutil.Process(self._server.process.pid), kill)
            self._wait_until_replaced(worker, starts)  # counted from when the supervisor can start processes again
        return worker is not None

    def _starve(self, process: psutil.Process, meanwhile: Callable[[], object]) -> None:
        usual = process.rlimit(resource.RLIMIT_NOFILE)
        process.rlimit(resource.RLIMIT_NOFILE, (NO_MORE_FILES, usual[1]))
        try:
            meanwhile()
        finally:
            process.rlimit(resource.RLIMIT_NOFILE, usual)

    def change_model(self) -> bool:
        """A good export, of either version."""
        self._files.write_model(self._choice.choice(list(SEEDS)))
        time.sleep(NOTICE_SECONDS)
        return True

    def damage_model(self) -> bool:
        """A damaged export, and after a while a good one."""
        self._files.damage_model(self._choice)
        time.sleep(NOTICE_SECONDS)
        self._files.write_model(self._choice.choice(list(SEEDS)))
        return True

    def renew_certificate(self) -> bool:
        """Another certificate of the same authority."""
        self._files.renew_certificate()
        return True

    def renew_token(self) -> bool:
        """Another token: first both are valid, then clients take the new one, then only it is valid."""
        old, new = self._clients.token, secrets.token_urlsafe()
        self._files.write_tokens(old, new)
        time.sleep(NOTICE_SECONDS)
        self._clients.token = new
        time.sleep(2 * NOTICE_SECONDS)  # calls that began with the old token end, with their retries
        self._files.write_tokens(new)
        return True

    def start_attack(self, name: str | None = None) -> bool:
        """An attack with a valid token, at the same time as the next fault."""
        for entry in list(self._attacks):
            if not entry[1].is_alive():
                entry[1].join()
                self._attacks.remove(entry)
        if len(self._attacks) >= ATTACKS_AT_ONCE:
            return False
        name = name or self._choice.choice(list(ATTACKS))
        self.done[f"attack: {name}"] += 1
        target = Target(self._server.port, self._files.ca, self._clients.token)
        process = multiprocessing.get_context("spawn").Process(target=attack, args=(name, target), daemon=True)
        process.start()
        self._attacks.append((name, process))
        return True

    def wait_for_attacks(self, seconds: float = 90.0) -> None:
        """Waits until those that run have ended."""
        end = time.monotonic() + seconds
        for name, process in self._attacks:
            process.join(max(0.0, end - time.monotonic()))
            if process.is_alive():
                self.failures.append(f"the attack {name!r} did not end")
                process.kill()
        self._attacks.clear()
