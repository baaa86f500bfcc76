"""The log, written by real processes: what reaches standard error, also from native libraries and in a crash."""

import contextlib
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
import tty
from pathlib import Path

import grpc
import numpy as np
import pytest
import trustme

from service.client import Client, Options
from tests.conftest import REPOSITORY

SETUP = "import logging, os, sys; from service import logs; log = logging.getLogger('service.test')\n"
ABSEIL = "E0000 00:00:1764018000.123456   12345 ssl_transport.cc:1884] Handshake failed"


def run(script: str) -> tuple[list[str], int]:
    """Lines on standard error, and the exit code."""
    done = subprocess.run(
        [sys.executable, "-c", SETUP + script], cwd=REPOSITORY, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == ""
    return done.stderr.splitlines(), done.returncode


def records(lines: list[str]) -> list[dict[str, object]]:
    return [json.loads(line) for line in lines]


def test_a_json_record_has_time_level_logger_message_and_extra_fields():
    (record,) = records(run("logs.configure('info', 'json', 3); log.warning('full: %d', 5, extra={'port': 7})")[0])
    assert record.pop("time")
    assert record == {"level": "WARNING", "logger": "service.test", "message": "full: 5", "port": 7, "worker": 3}


def test_records_below_the_level_and_those_of_libraries_below_warning_are_left_out():
    lines, _ = run(
        "logs.configure('warning', 'human'); log.info('a'); log.warning('b')\n"
        "logging.getLogger('library').info('c'); logging.getLogger('library').error('d')"
    )
    assert [line.split()[-1] for line in lines] == ["b", "d"]


@pytest.mark.parametrize("style", ["human", "json"])
def test_a_line_that_cannot_be_written_is_lost_and_nothing_else(style):
    lines, code = run(
        f"logs.configure('info', '{style}'); log.warning('before')\n"
        "from multiprocessing.util import _flush_std_streams\n"  # as before each start of a process
        "descriptor = sys.stderr.fileno(); kept = os.dup(descriptor)\n"
        "os.dup2(os.open('/dev/full', os.O_WRONLY), descriptor); log.warning('lost'); _flush_std_streams()\n"
        "os.dup2(kept, descriptor); log.warning('after'); _flush_std_streams(); os._exit(7)"
    )
    assert code == 7
    assert [word in "".join(lines) for word in ("before", "lost", "after")] == [True, False, True]


def test_a_line_reaches_the_log_in_one_piece():
    with subprocess.Popen(
        [sys.executable, "-c", SETUP + "logs.configure('info', 'human'); print('a', 'b', file=sys.stderr, flush=True)"],
        cwd=REPOSITORY, stderr=subprocess.PIPE, bufsize=0,
    ) as process:  # fmt: skip
        assert process.stderr.read(100) == b"a b\n"


@pytest.mark.parametrize("style", ["human", "json"])
def test_control_characters_of_clients_neither_begin_a_line_nor_reach_the_terminal(style):
    lines, _ = run(
        rf"logs.configure('info', '{style}'); log.info('name %s', 'a\nERROR forged\r\x1b[2J\x9b\u202e\ud800ä', "
        r"extra={'id': 'b\n\x1b'})"
    )
    assert len(lines) == 1
    assert lines[0].isprintable()
    assert "ERROR forged" in lines[0]
    if style == "human":
        assert r"a\nERROR forged\r\x1b[2J\x9b\u202e\ud800ä" in lines[0]


def test_an_exception_is_logged_with_its_traceback_and_its_text_is_escaped():
    lines, _ = run(
        "logs.configure('info', 'human')\ntry: raise ValueError('no\\x1b[2J')\n"
        "except ValueError: log.exception('it failed')"
    )
    assert lines[0].endswith("it failed")
    assert lines[-1] == r"ValueError: no\x1b[2J"
    assert len(lines) >= 4


def test_lines_of_native_libraries_become_records_of_a_json_log():
    lines, _ = run(
        "logs.configure('info', 'json'); log.info('first')\n"
        f"os.write(2, b'{ABSEIL}\\nplain\\n\\n'); os.system('echo from a child >&2'); os.write(2, b'no end of line')"
    )
    seen = [(record["logger"], record["level"], record["message"]) for record in records(lines)]
    assert seen == [
        ("service.test", "INFO", "first"),
        ("grpc.core", "ERROR", "Handshake failed"),
        ("stderr", "WARNING", "plain"),
        ("stderr", "WARNING", "from a child"),
        ("stderr", "WARNING", "no end of line"),
    ]


def test_a_child_that_outlives_the_process_does_not_delay_its_end():
    began = time.monotonic()
    child = "[sys.executable, '-c', 'import time; time.sleep(20)'], stdout=subprocess.DEVNULL"
    with subprocess.Popen(
        [
            sys.executable,
            "-c",
            SETUP + f"import subprocess, time; logs.configure('info', 'json'); child = subprocess.Popen({child})\n"
            "os.write(2, b'last words'); print(child.pid)",
        ],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        child_pid = int(process.stdout.readline())
        try:
            assert process.wait(20) == 0
            assert time.monotonic() - began < 15
        finally:
            os.kill(child_pid, signal.SIGKILL)
        assert process.stderr is not None
        assert json.loads(process.stderr.read())["message"] == "last words"


def test_nothing_is_lost_where_a_process_ends_without_pythons_own_end():
    lines, _ = run("logs.configure('info', 'json'); os.write(2, b'last words'); logs.close(); os._exit(0)")
    assert [record["message"] for record in records(lines)] == ["last words"]


def test_native_lines_are_left_as_they_are_in_a_log_for_people():
    lines, _ = run(f"logs.configure('info', 'human'); os.write(2, b'{ABSEIL}\\n')")
    assert lines == [ABSEIL]


def test_a_flood_of_native_lines_neither_blocks_the_process_nor_harms_the_log():
    lines, code = run(
        "logs.configure('info', 'json')\n"
        "for _ in range(20000):\n"
        "    try: os.write(2, b'x' * 99 + b'\\n')\n"
        "    except BlockingIOError: pass\n"
        "log.info('still here')"
    )
    assert code == 0
    assert "still here" in {record["message"] for record in records(lines)}


@pytest.mark.parametrize("style", ["human", "json"])
def test_a_crash_loses_no_record_and_shows_where_it_happened(style):
    lines, code = run(
        f"import ctypes; logs.configure('info', '{style}')\n"
        "for number in range(200): log.info('record %d', number)\n"
        "ctypes.string_at(0)"
    )
    assert code < 0
    assert all(f"record {number}" in lines[number] for number in range(200))
    assert lines[200] == "Fatal Python error: Segmentation fault"
    assert any("string_at" in line for line in lines[201:])


@pytest.mark.parametrize(
    "where", ["def f(): 1 / 0\nf()", "import threading; threading.Thread(target=lambda: 1 / 0).start()"]
)
def test_unexpected_errors_are_records_of_a_json_log(where):
    lines, _ = run(f"logs.configure('info', 'json')\n{where}")
    (record,) = records(lines)
    assert record["level"] == "CRITICAL"
    assert "ZeroDivisionError" in str(record["exc_info"])


def test_a_child_with_the_descriptor_of_the_log_writes_to_the_same_place():
    child = SETUP + (
        f"logs.configure('info', 'json', 1, int(sys.argv[1])); log.info('own')\nos.write(2, b'{ABSEIL}' + bytes([10]))"
    )
    lines, _ = run(
        "import subprocess; logs.configure('info', 'json'); number = logs.log_descriptor()\n"
        f"subprocess.run([sys.executable, '-c', {child!r}, str(number)], pass_fds=[number], check=True)"
    )
    seen = records(lines)
    assert {str(record["message"]) for record in seen} == {"own", "Handshake failed"}
    assert next(record for record in seen if record["message"] == "own")["worker"] == 1


@pytest.mark.parametrize("workers", ["1", "2"])
def test_failed_handshakes_with_a_tls_server_are_json_too(start_server, linear, tmp_path, workers):
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost", "127.0.0.1")
    certificate.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    certificate.private_key_pem.write_to_path(tmp_path / "key.pem")
    server = start_server(
        "--model", linear, "--workers", workers,
        "--tls-cert", tmp_path / "cert.pem", "--tls-key", tmp_path / "key.pem",
    ).ready()  # fmt: skip
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as client:
            client.sendall(b"GET / HTTP/1.1\r\n\r\n" * 100)
            client.settimeout(10)
            while client.recv(4096):
                pass
    server.wait_for('"logger": "grpc.core".*Handshake failed')
    with grpc.secure_channel(
        f"localhost:{server.port}", grpc.ssl_channel_credentials(authority.cert_pem.bytes())
    ) as channel:
        grpc.channel_ready_future(channel).result(30)
    assert server.stop() == 0
    assert all(json.loads(line) for line in server.lines), server.log
    assert Path(f"/proc/{server.process.pid}").exists() is False


@pytest.mark.parametrize(
    ("kind", "style"),
    [("pipe", "json"), ("pipe of another user", "human"), ("socket", "human"), ("terminal", "human")],
)
def test_a_log_that_nobody_reads_loses_lines_and_stops_nothing(kind, style):
    """Each line that is not lost is whole, and the first one after the others is followed by their number."""
    with contextlib.ExitStack() as stack:
        reading, writing = socket_pair() if kind == "socket" else os.openpty() if kind == "terminal" else os.pipe()
        stack.callback(os.close, reading)
        if kind == "terminal":
            tty.setraw(writing)
        process = stack.enter_context(
            subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    SETUP
                    + ("logs._never_block = lambda descriptor: None\n" if kind == "pipe of another user" else "")
                    + f"logs.configure('info', '{style}')\n"
                    # As other workers do meanwhile, lines of several lengths.
                    "for number in range(3000): log.warning('%s end', number * 'x')\n"
                    "print(flush=True); input(); log.warning('after'); print(flush=True); input()",
                ],
                cwd=REPOSITORY,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=writing,
            )
        )
        stack.callback(process.kill)
        os.close(writing)
        assert process.stdin
        assert process.stdout
        assert process.stdout.readline() == b"\n"  # nothing was read so far
        log = read_available(reading)
        process.stdin.write(b"\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"\n"
        log += read_available(reading)
        process.stdin.write(b"\n")
        process.stdin.flush()
        assert process.wait(60) == 0
    *lines, after, note = log.decode().splitlines()
    whole = [line for line in lines if line.endswith((" end", ' end"}'))]
    assert len(lines) - len(whole) <= 1  # the beginning of the first line without room
    assert 0 < len(whole) < 3000
    assert "after" in after
    assert f"{3000 - len(whole)} lines of the log before the last one were lost" in note
    if style == "json":
        assert [record["message"] for record in records(whole)] == [f"{n * 'x'} end" for n in range(len(whole))]


def socket_pair() -> tuple[int, int]:
    """The descriptors of two connected sockets."""
    reading, writing = socket.socketpair()
    return reading.detach(), writing.detach()


def read_available(descriptor: int) -> bytes:
    """What can be read without waiting longer than a moment."""
    content = b""
    while select.select([descriptor], [], [], 0.2)[0]:
        content += os.read(descriptor, 65536)
    return content


def test_a_server_whose_log_nobody_reads_answers(linear):
    """As with a log collector that hangs. The worker writes to the same pipe as the supervisor."""
    options = ["--port", "0", "--model", str(linear), "--log-level", "debug", "--workers", "2"]
    with subprocess.Popen(
        [sys.executable, "-m", "service", *options], cwd=REPOSITORY, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as server:
        try:
            assert server.stderr
            port = next(int(found[1]) for line in server.stderr if (found := re.search(rb"port=(\d+)", line)))
            image = np.zeros((32, 32, 3), np.uint8)
            with Client(f"127.0.0.1:{port}", Options(timeout=30)) as client:
                for _ in range(1000):  # each makes one line of more than 100 bytes
                    assert client.classify([image])
        finally:
            server.kill()
