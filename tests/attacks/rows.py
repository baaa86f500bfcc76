"""The rows of the table: each runs attacks against a server and measures what it promises."""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.processes import cpu_seconds
from tests.attacks import failing_processes, floods, image_bombs, payloads, rude_calls
from tests.attacks.http2 import CLASSIFY, Target
from tests.attacks.measured import Measured
from tests.attacks.observers import HonestClients, MemoryWatch, wait_until_idle
from tests.attacks.server import AttackedServer
from tests.attacks.stalls import StalledMessages

HONEST_SECONDS = 0.3
STALL_SECONDS = 0.05
FLOOD_SECONDS = 5.0
WARM_UP_SECONDS = 2.0
PEAK_MIB = 600.0
KEPT_MIB = 64.0
RECOVERY_SECONDS = 30.0
DECODE_SECONDS = 1.0  # the default of --max-decode-seconds
DEADLINE_SECONDS = 2.0
MIB = 2**20


Row = Callable[[AttackedServer], list[Measured]]


def _failures(honest: HonestClients, allowed: str = "") -> Measured:
    failures = {status: count for status, count in honest.seen.failures.items() if status != allowed}
    statuses = f" ({', '.join(failures)})" if failures else ""
    return Measured(f"failed calls of honest clients{statuses}", sum(failures.values()), 0)


def _answered(calls: float) -> Measured:
    return Measured("calls answered, not refused", calls, 0)


def _memory(watch: MemoryWatch) -> list[Measured]:
    return [
        Measured("memory at the peak", watch.peak, PEAK_MIB, "MiB"),
        Measured("memory kept", watch.after(KEPT_MIB, RECOVERY_SECONDS) - watch.before, KEPT_MIB, "MiB"),
    ]


def image_bomb(server: AttackedServer, requests: list[list[bytes]], watch_seconds: float = 60.0) -> list[Measured]:
    """Requests of expensive files whose clients give up after two seconds."""
    honest = HonestClients(server.victim, clients=2)
    with MemoryWatch(server.pid) as watch:
        with honest:
            rude_calls.send_files(server.victim, requests, timeout=DEADLINE_SECONDS)
            wait_until_idle(server.pid, watch_seconds, share=0.6)
        before = cpu_seconds(server.pid)
        rude_calls.send_files(server.victim, requests, timeout=DEADLINE_SECONDS)
        wait_until_idle(server.pid, watch_seconds)
        spent = cpu_seconds(server.pid) - before
    return [
        Measured("slowest honest PNG", honest.seen.slowest, HONEST_SECONDS, "s"),
        _failures(honest),
        Measured("CPU spent", spent, 2 * DECODE_SECONDS, "s"),
        *_memory(watch),
    ]


def large_body(server: AttackedServer, name: str, size: int = payloads.LIMIT, tries: int = 3) -> list[Measured]:
    """A request that is expensive to parse or to walk, sent several times: the stall is the shortest of the tries.

    A stall that the request causes is seen in each try, one that another program on the machine causes is not.
    """
    method, body = payloads.body(name, size)
    statuses, stalls = set[str](), []
    with MemoryWatch(server.pid) as watch:
        for _ in range(tries):
            honest = HonestClients(server.victim, clients=0, probe=True)
            with honest:
                statuses |= set(rude_calls.send_bodies(server.victim, method, [body]))
            stalls.append(honest.seen.longest_probe)
    refused = [] if name in payloads.MAY_BE_ANSWERED else [_answered("OK" in statuses)]
    return [Measured("stall", min(stalls), STALL_SECONDS, "s"), *refused, *_memory(watch)]


def many_long_texts(server: AttackedServer, size: int = payloads.OLD_LIMIT, copies: int = 40) -> list[Measured]:
    """Many requests at once with a long text in a field that is no image."""
    answered = 0
    with MemoryWatch(server.pid) as watch:
        for name in payloads.LONG_TEXTS:
            method, body = payloads.body(name, size)
            answered += rude_calls.send_bodies(server.victim, method, [body] * copies)["OK"]
    return [_answered(answered), *_memory(watch)]


def rapid_reset(
    server: AttackedServer, streams: int = 100_000, seconds: float = 5.0, share: float = 0.5
) -> list[Measured]:
    """Streams are opened and reset over one connection while four honest clients call.

    Their throughput is compared with that before the attack; `share` is its limit.
    """
    usual = HonestClients(server.victim, clients=4, image="pixels", pause=0.0)
    with usual:
        time.sleep(seconds)
    attacked = HonestClients(server.victim, clients=4, image="pixels", pause=0.0)
    with attacked:
        floods.rapid_reset(server.victim, streams, seconds)
    return [
        Measured("honest throughput", attacked.seen.rate / usual.seen.rate, share, "of the usual", at_least=True),
        _failures(attacked),
    ]


def stalled_messages(
    server: AttackedServer, connections: int, streams: int, size: int, seconds: float = RECOVERY_SECONDS
) -> list[Measured]:
    """Messages that begin and never end."""
    with MemoryWatch(server.pid) as watch:
        with StalledMessages(server.victim, connections, streams, size, CLASSIFY) as stalled:
            stalled.wait_until_stalled(seconds)
            stalled.wait_until_ended(seconds)
            left = stalled.open_streams
        measured = _memory(watch)
    return [*measured, Measured("stalled messages not ended", left, 0)]


def cancelled_streams(server: AttackedServer, count: int = 500) -> list[Measured]:
    """Streams that their clients cancel."""
    before = server.tasks()
    rude_calls.cancel_streams(server.victim, count)
    wait_until_idle(server.pid, 10)
    return [Measured("asyncio tasks left", server.tasks() - before, 2)]


def flood(server: AttackedServer, attack: Callable[[Target], object]) -> list[Measured]:
    """Any attack of the catalogue while honest clients call that connected before it."""
    honest = HonestClients(server.victim, clients=2, image="pixels")
    with MemoryWatch(server.pid) as watch:
        with honest:
            attack(server.victim)
        measured = _memory(watch)
    return [
        # An attack of correct calls may fill the queue; the server then refuses further calls at once.
        _failures(honest, allowed="RESOURCE_EXHAUSTED"),
        Measured("slowest honest answer", honest.seen.slowest, FLOOD_SECONDS, "s"),
        *measured,
    ]


ISSUE: dict[str, Row] = {
    "two progressive JPEG of 2,000 scans": lambda server: image_bomb(server, [[image_bombs.progressive_jpeg()]] * 2),
    "eight run-length BMP of 1,084 bytes": lambda server: image_bomb(server, [[image_bombs.run_length_bmp()] * 8]),
    "four 16-bit PNG of 5600×5600": lambda server: image_bomb(server, [[image_bombs.png()] * 4]),
    "16 MB of empty images": lambda server: large_body(server, "empty images", payloads.OLD_LIMIT),
    "rapid reset of 100,000 streams": rapid_reset,
    "200 connections stalled in 8 MiB": lambda server: stalled_messages(server, 200, 1, 8 * MIB),
    "20 × 90 streams stalled in 3.9 MiB": lambda server: stalled_messages(server, 20, 90, int(3.9 * MIB)),
    "16 MB of request_id, id, parameters": many_long_texts,
    "500 cancelled streams": cancelled_streams,
    "kill -STOP of one of two workers": failing_processes.stopped_worker,
    "kill -40 of one of two workers": failing_processes.real_time_signal,
    "a worker killed while no process can be started": failing_processes.failed_start,
    "a batch that never ends": failing_processes.stuck_engine,
    "SIGTERM while a batch never ends": failing_processes.sigterm_while_stuck,
}
ENDS_THE_SERVER = ("a batch that never ends", "SIGTERM while a batch never ends")


def options(name: str) -> tuple[str, ...]:
    """Options of the server of a row; most have none."""
    if name in ENDS_THE_SERVER:
        return failing_processes.stuck_options()
    return ("--workers", str(failing_processes.WORKERS)) if "worker" in name else ()


def more_rows() -> dict[str, Row]:
    """A row for each other attack of the catalogue."""
    from tests.attacks.catalogue import FILES, FLOODS, STALLS

    rows: dict[str, Row] = {}
    for name, attack in {**FLOODS, **STALLS, **FILES}.items():
        rows[name] = lambda server, attack=attack: flood(server, attack)  # type: ignore[misc]
    for name in payloads.BODIES:
        rows[f"8 MB of {name}"] = lambda server, name=name: large_body(server, name)  # type: ignore[misc]
    rows["8 MB of request_id, id, parameters"] = lambda server: many_long_texts(server, payloads.LIMIT)
    return {name: row for name, row in rows.items() if name not in ISSUE}


def run(name: str, row: Row, checkout: Path) -> list[Measured]:
    """Runs a row against a server of its own, so that no row sees what another left."""
    with contextlib.ExitStack() as stack:
        server = AttackedServer(checkout, *options(name))
        stack.callback(server.kill)
        server.ready()
        if name in ENDS_THE_SERVER:
            return row(server)
        with HonestClients(server.victim, clients=4, pause=0.0):
            time.sleep(WARM_UP_SECONDS)  # so that what is allocated once is allocated
        measured = row(server)
        return [*measured, Measured("server does not answer afterwards", float(not server.answers()), 0)]
