"""Scores parts on a Ray cluster: an actor per core, each with the scorer that the local run uses.

Ray Data hands the numbers of parts to the actors, and gives those of an actor or a node that ends to another. The
actors read the input and write the parts themselves, so no image passes through Ray's object store, and a part that is
computed twice is written twice with the same content under the same name.
"""

import asyncio
import logging
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray
from ray.data import ActorPoolStrategy, DataContext

from service.score.errors import ScoreError
from service.score.output import OutputFolder
from service.score.progress import ScoreProgress
from service.score.rows import Content
from service.score.scorer import Scored, ScoreOptions, Scorer
from service.score.sources import open_source

Input = tuple[Path, str | None, Content, str | None]
"""Path, column, content and key of the input."""
_CONNECT_SECONDS = 10.0
# Ray replaces these by the address of the machine.
_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")

Batch = dict[str, NDArray[Any]]


class ScorerActor:
    """A scorer in an actor of Ray Data.

    Args:
        where: The input, absolute.
        output: The output folder, absolute.
        options: The options of the run.
        sha256: SHA-256 of the model's file. Another model in its place is an error, so that all rows are of one model.
    """

    def __init__(self, where: Input, root: Path, output: Path, options: ScoreOptions, sha256: str) -> None:
        # Decode processes would otherwise begin by running the main program of Ray's workers.
        vars(sys.modules["__main__"]).pop("__file__", None)
        self._runner = asyncio.Runner()
        self._scorer: Scorer | None = None
        self._error = ""
        try:
            self._scorer = self._runner.run(_scorer(where, root, output, options, sha256))
        except ScoreError as failure:  # an exception would come back as a traceback
            self._error = str(failure)

    def __call__(self, batch: Batch) -> Batch:
        """Scores the part whose number a batch holds; returns its numbers of rows, or why it cannot be scored."""
        (part,) = batch["part"]
        scored, error = Scored(0, 0), self._error
        if self._scorer is not None:
            try:
                scored = self._runner.run(self._scorer.score(int(part)))
            except ScoreError as failure:  # and only after Ray's attempts to repeat
                error = str(failure)
        return {
            "rows": np.array([scored.rows]),
            "failed": np.array([scored.failed]),
            "error": np.array([error]),
        }


async def _scorer(where: Input, root: Path, output: Path, options: ScoreOptions, sha256: str) -> Scorer:
    _, source = open_source(*where, root=root)
    scorer = Scorer(options, source, OutputFolder(output))
    if scorer.model.sha256 != sha256:
        raise ScoreError(f"{options.model}: the model was replaced during the run; restore it and use --resume")
    return scorer


def score_on_cluster(
    address: str,
    where: Input,
    output: OutputFolder,
    options: ScoreOptions,
    sha256: str,
    parts: Sequence[int],
    progress: ScoreProgress,
) -> int:
    """Scores parts on a cluster.

    Args:
        address: Address of the cluster; "local" starts one on this machine for this run.
        where: The input.
        output: The output folder.
        options: The options of the run.
        sha256: SHA-256 of the model's file.
        parts: Numbers of the parts.
        progress: Counts the rows of each part that was written.

    Returns:
        Number of rows that have an error.

    Raises:
        ScoreError: The cluster cannot be reached, or a part cannot be scored.
    """
    _connect(address)
    try:
        return _score((where, Path.cwd(), output.path.resolve(), options, sha256), parts, progress)
    finally:
        ray.shutdown()


def _score(
    arguments: tuple[Input, Path, Path, ScoreOptions, str], parts: Sequence[int], progress: ScoreProgress
) -> int:
    """Scores parts on the cluster that this process is connected to, with these arguments of the actors."""
    DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    cluster: Any = ray  # the function has no types
    actors = max(1, min(len(parts), int(cluster.cluster_resources().get("CPU", 1))))
    # A block of one row for each part, so that each call of an actor scores one part.
    rows = ray.data.from_items([{"part": part} for part in parts], override_num_blocks=len(parts))
    results = rows.map_batches(
        ScorerActor,
        fn_constructor_args=arguments,
        batch_size=1,
        compute=ActorPoolStrategy(min_size=1, initial_size=actors, max_size=actors),
        num_cpus=1,
    )
    failed = 0
    for result in results.iter_rows():
        if result["error"]:
            raise ScoreError(str(result["error"]))
        progress.add(int(result["rows"]))
        failed += int(result["failed"])
    return failed


def _connect(address: str) -> None:
    """Connects this process to a cluster, or starts one. Raises ScoreError."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    own: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    try:
        _check_address(address)
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **own)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise ScoreError(
            f"--ray {address}: cannot connect to a Ray cluster there: {error}. If the cluster wants a token, "
            "set RAY_AUTH_MODE=token and give the token in ~/.ray/auth_token or RAY_AUTH_TOKEN"
        ) from error


def _check_address(address: str) -> None:
    """Connects once, because Ray itself waits for minutes. Raises OSError."""
    host, _, port = address.rpartition(":")
    if port.isdecimal() and "/" not in host:
        util: Any = ray.util  # the function has no types
        host = util.get_node_ip_address() if host in _LOOPBACK else host.strip("[]")
        try:
            socket.create_connection((host, int(port)), _CONNECT_SECONDS).close()
        except OSError as error:
            raise ConnectionError(f"nothing answers at {host}:{port} ({error})") from error
