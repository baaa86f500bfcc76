"""All attacks by name, each with sizes that make it last some seconds; for the chaos run and the table."""

import functools
from collections.abc import Callable

from tests.attacks import floods, image_bombs, payloads, rude_calls, stalls
from tests.attacks.http2 import MODEL_INFER, PREFACE, SETTINGS, Target, frame

Attack = Callable[[Target], object]


def _body(name: str, copies: int = 4) -> Attack:
    def attack(target: Target) -> object:
        method, body = payloads.body(name, payloads.LIMIT)
        return rude_calls.send_bodies(target, method, [body] * copies)

    return attack


def _files(copies: int, make: Callable[[], bytes]) -> Attack:
    return lambda target: rude_calls.send_files(target, [[make()] * copies] * 2, timeout=5)


FLOODS: dict[str, Attack] = {
    "rapid reset": floods.rapid_reset,
    **{kind: functools.partial(floods.frames, kind=kind) for kind in floods.FRAMES},
    "metadata of 1 MiB": floods.large_metadata,
    "random bytes": floods.garbage,
    "1,000 idle TCP connections": floods.hold_idle_connections,
    "1,000 idle HTTP/2 connections": functools.partial(
        floods.hold_idle_connections, first=PREFACE + frame(SETTINGS, 0, 0, b"")
    ),
    "slow prefaces": floods.slow_prefaces,
    "half-open connections": floods.half_open,
    "connections reset in the middle of a call": floods.vanish,
    "cancelled streams": rude_calls.cancel_streams,
    "cancelled calls": rude_calls.cancel_calls,
    "answers that nobody reads": rude_calls.never_read,
    "a stream that nobody reads": rude_calls.never_read_stream,
}
STALLS: dict[str, Attack] = {
    "stalled messages of 8 MiB": stalls.stall,
    "stalled messages on many streams": functools.partial(stalls.stall, connections=10, streams=90, size=4_089_446),
    "stalled messages of the Open Inference Protocol": functools.partial(
        stalls.stall, connections=20, method=MODEL_INFER
    ),
}
BODIES: dict[str, Attack] = {f"a message of {name}": _body(name) for name in payloads.BODIES}
FILES: dict[str, Attack] = {
    "progressive JPEG": _files(1, image_bombs.progressive_jpeg),
    "run-length BMP": _files(8, image_bombs.run_length_bmp),
    "16-bit PNG": _files(4, image_bombs.png),
    "16-bit PNG with transparency": _files(4, lambda: image_bombs.png(colour=6)),
    "PNG of very many chunks": _files(1, image_bombs.png_of_chunks),
    "GIF of many pixels": _files(8, image_bombs.gif),
    "WebP of many pixels": _files(8, image_bombs.webp),
}
ATTACKS: dict[str, Attack] = {**FLOODS, **STALLS, **BODIES, **FILES}
