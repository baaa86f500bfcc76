"""The log, on standard error: one line per event, for people or as JSON. Never a secret, never an image."""

import json
import logging
import sys
from typing import Literal

from pythonjsonlogger.json import JsonFormatter

# What every record has; the rest was given with `extra`.
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "worker"}


class _HumanFormatter(logging.Formatter):
    """Time, level, message, then what was given besides, as key=value."""

    def format(self, record: logging.LogRecord) -> str:
        extras = {key: value for key, value in vars(record).items() if key not in _STANDARD}
        line = super().format(record)
        if not extras:
            return line
        first, newline, rest = line.partition("\n")
        return (
            first
            + "".join(f" {key}={json.dumps(value, default=str)}" for key, value in extras.items())
            + newline
            + rest
        )


def configure(level: str, style: Literal["human", "json"], worker: int | None = None) -> None:
    """Sends everything of this level and above to standard error.

    Args:
        level: "debug", "info", "warning" or "error".
        style: How a line looks.
        worker: Number of the process, where there are several; part of every line.
    """
    handler = logging.StreamHandler(sys.stderr)
    if style == "json":
        handler.setFormatter(
            JsonFormatter(
                "%(asctime)s%(levelname)s%(name)s%(message)s",
                rename_fields={"asctime": "time", "levelname": "level", "name": "logger"},
                static_fields={} if worker is None else {"worker": worker},
                datefmt="%Y-%m-%dT%H:%M:%S%z",
            )
        )
    else:
        prefix = "" if worker is None else f"[{worker}] "
        handler.setFormatter(_HumanFormatter(f"%(asctime)s %(levelname)-7s {prefix}%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("service").setLevel(level.upper())
