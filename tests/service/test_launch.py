"""Starting servers as child processes."""

import signal
import socket
import subprocess
import sys

import grpc
import pytest

from service.errors import StartError
from service.launch import ServerProcess
from tests.conftest import REPOSITORY, prepared


def test_a_server_is_started_followed_and_stopped(linear):
    with ServerProcess("--model", linear, "--metrics-port", "0", folder=REPOSITORY) as server:
        server.ready()
        assert server.target == f"127.0.0.1:{server.port}"
        assert any(name.startswith("cifar_service_model_info") for name in server.metrics())
        assert server.wait_for("serving linear-0")["level"] == "INFO"
        assert server.process.poll() is None
    assert server.process.returncode == 0
    assert '"stopped"' in server.log


def test_a_server_that_cannot_start_says_why(tmp_path):
    said = r"(?s)the server ended with exit code 2 and without .*manifest\.json"
    with ServerProcess("--model", tmp_path, folder=REPOSITORY) as server, pytest.raises(StartError, match=said):
        server.ready()


def test_a_line_that_does_not_arrive_ends_the_wait(linear):
    with (
        ServerProcess("--model", linear, folder=REPOSITORY) as server,
        pytest.raises(TimeoutError, match=r"no /never logged/ in the server's log within 0\.1 s"),
    ):
        server.wait_for("never logged", seconds=0.1)


def test_variables_for_another_server_are_not_inherited_but_can_be_given(linear, monkeypatch):
    monkeypatch.setenv("CIFAR_SERVICE_MAX_IMAGES", "wrong")
    with ServerProcess("--model", linear, folder=REPOSITORY) as server:
        server.ready()
    given = {"CIFAR_SERVICE_MAX_IMAGES": "wrong"}
    with (
        ServerProcess("--model", linear, folder=REPOSITORY, environment=given) as server,
        pytest.raises(StartError, match="--max-images wrong"),
    ):
        server.ready()


def test_a_command_before_the_server_and_another_folder_are_possible(linear, tmp_path):
    set_variant = "import os, sys; os.environ['CIFAR_SERVICE_VARIANT'] = 'fp64'; os.execv(sys.argv[1], sys.argv[1:])"
    with (
        ServerProcess(
            "--model",
            linear,
            folder=tmp_path,
            environment={"PYTHONPATH": str(REPOSITORY)},
            prefix=(sys.executable, "-c", set_variant),
        ) as server,
        pytest.raises(StartError, match="fp64"),
    ):
        server.ready()


def test_a_killed_server_leaves_its_log(linear):
    server = ServerProcess("--model", linear, folder=REPOSITORY).ready()
    server.kill()
    assert server.wait() == -signal.SIGKILL
    assert "serving" in server.log


def test_a_server_whose_standard_streams_are_closed_serves(linear):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "service", "--model", linear, "--port", str(port)]
    server = subprocess.Popen(prepared("os.closerange(0, 3)", command), cwd=REPOSITORY)
    try:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            grpc.channel_ready_future(channel).result(30)
    finally:
        server.send_signal(signal.SIGTERM)
    assert server.wait(30) == 0
