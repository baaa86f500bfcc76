"""Loads what all decode processes share. Only their fork server imports this module.

SIGTERM sent to all processes of a service (a terminal, systemd's control group) must not end the fork server while the
server drains; it ends when the server does.
"""

import gc
import signal

import service.core.decode_worker  # noqa: F401 -- loaded here so that each process starts with it

signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGHUP, signal.SIG_IGN)
gc.collect()
gc.freeze()  # the pages of these objects stay shared
