"""Clients that retry, each a thread with a connection of its own, and that check every answer they get."""

import io
import random
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from service.client import ClassificationError, Client, Options
from tests.service.exports import expected, pictures

POOL = pictures(2048, seed=99)
# What each version of the model answers for the pool, computed in NumPy. No two of its images have similar answers.
SEEDS = {"first": 0, "second": 1}
ANSWERS = {version: expected(seed, POOL) for version, seed in SEEDS.items()}
TOLERANCE = 1e-5
SIZES = (1, 1, 1, 2, 3, 7, 31, 32, 33, 64, 100, 300)
FILES = 8  # image files in one call at most
CALL_SECONDS = 120.0
# A client opens a connection anew after so many calls, so that replaced workers get their share.
CALLS_OF_CONNECTION = 50


def png(row: int) -> bytes:
    """An image of the pool as a file, which loses nothing."""
    stream = io.BytesIO()
    Image.fromarray(POOL[row]).save(stream, "PNG", compress_level=1)
    return stream.getvalue()


@dataclass
class Outcomes:
    """What the clients saw.

    Attributes:
        calls: Calls that were answered rightly.
        images: Images in them.
        wrong: Answers that are those of no version of the model, or of another image.
        lost: Calls that failed in spite of retries, by reason.
        slowest: Seconds of the slowest call, with its retries.
        versions: Images by the version that answered, where the call tells it.
    """

    calls: int = 0
    images: int = 0
    wrong: int = 0
    lost: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0
    versions: Counter[str] = field(default_factory=Counter)


class Clients:
    """Clients that ask until `stop`; `pause` lets the server rest.

    Args:
        target: HOST:PORT of the server.
        ca: PEM file of the authority of its certificate.
        token: The first token; assign `token` when another one is valid.
        count: Number of clients.
    """

    def __init__(self, target: str, ca: Path, token: str, count: int = 50) -> None:
        self.outcomes = Outcomes()
        self.token = token
        self._target, self._ca = target, ca
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._running = threading.Event()
        self._running.set()
        self._threads = [threading.Thread(target=self._ask, args=(seed,), daemon=True) for seed in range(count)]
        for thread in self._threads:
            thread.start()

    def pause(self) -> None:
        """Each client ends its call and waits."""
        self._running.clear()

    def resume(self) -> None:
        """The clients go on."""
        self._running.set()

    def stop(self) -> None:
        """Waits for the calls in flight. A client that hangs counts as a lost call."""
        self._stopped.set()
        self._running.set()
        end = time.monotonic() + CALL_SECONDS + 30
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
            if thread.is_alive():
                self.outcomes.lost["a client that never came back"] += 1

    def _ask(self, seed: int) -> None:
        choice = random.Random(seed)
        while not self._stopped.is_set():
            token = self.token
            # As many attempts as the time allows: a call is lost if it fails for good, not if it takes long.
            options = Options(ca=self._ca, token=token, timeout=CALL_SECONDS, attempts=10_000)
            with Client(self._target, options) as client:
                for _ in range(CALLS_OF_CONNECTION):
                    self._running.wait()
                    if self._stopped.is_set() or self.token != token:
                        break
                    self._once(client, choice)

    def _once(self, client: Client, choice: random.Random) -> None:
        as_files = choice.random() < 0.3
        count = min(FILES, choice.choice(SIZES)) if as_files else choice.choice(SIZES)
        rows = [choice.randrange(len(POOL)) for _ in range(count)]
        began = time.monotonic()
        reason, right = "", False
        try:
            right = self._files(client, rows) if as_files else self._pixels(client, rows)
        except ClassificationError as error:
            reason = str(error)[:200]
        except Exception as error:  # noqa: BLE001 -- whatever it is, the call is lost, and the table says why
            reason = f"{type(error).__name__}: {error}"[:200]
        with self._lock:
            self.outcomes.slowest = max(self.outcomes.slowest, time.monotonic() - began)
            if reason:
                self.outcomes.lost[reason] += 1
            elif right:
                self.outcomes.calls += 1
                self.outcomes.images += len(rows)
            else:
                self.outcomes.wrong += 1

    def _pixels(self, client: Client, rows: list[int]) -> bool:
        """Whether the answer for each image is that of the same version of the model, whichever it is."""
        probabilities = client.probabilities(POOL[rows])
        return any(np.abs(probabilities - answers[rows]).max() < TOLERANCE for answers in ANSWERS.values())

    def _files(self, client: Client, rows: list[int]) -> bool:
        """Whether the answer for each file is that of the version that it names."""
        answers = client.classify([png(row) for row in rows])
        if len(answers) != len(rows):
            return False
        for row, answer in zip(rows, answers, strict=True):
            if answer.error is not None:
                raise ValueError(f"an image that is not damaged was refused: {answer.error}")
            for ranked in answer.classes:
                if abs(ranked.probability - ANSWERS[answer.model_version][row][ranked.index]) > TOLERANCE:
                    return False
        with self._lock:
            self.outcomes.versions.update(answer.model_version for answer in answers)
        return True
