"""nginx and HAProxy in front of three servers, with the configuration files that docs/deployment.md gives."""

import contextlib
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.end_to_end.replicas import Load, Replicas, kill_one, load_on, restart_one_after_another
from tests.service.conftest import until

NGINX = REPOSITORY / "deploy/nginx/nginx.conf"
HAPROXY = REPOSITORY / "deploy/haproxy/haproxy.cfg"
pytestmark = pytest.mark.slow


def addresses(configuration: Path) -> tuple[str, list[str], int]:
    """The address of a proxy, and the hosts and the port of the servers, from its configuration file."""
    text = configuration.read_text()
    (own,) = re.findall(r"^\s+(?:listen|bind) (\S+) ", text, re.MULTILINE)
    servers = re.findall(r"^\s+server (?:\w+ )?([\d.]+):(\d+)", text, re.MULTILINE)
    (port,) = {int(port) for _, port in servers}
    return own, [host for host, _ in servers], port


@contextlib.contextmanager
def proxy(name: str, folder: Path) -> Iterator[str]:
    """Runs a proxy with its configuration file; yields its address."""
    program = shutil.which(name) or shutil.which(name, path="/usr/sbin")
    if program is None:
        pytest.skip(f"{name} is not installed (Debian: apt-get install nginx-light haproxy)")
    if name == "nginx":
        own = addresses(NGINX)[0]
        options = ["-g", f"daemon off; pid {folder}/nginx.pid;"]
        command = [program, "-c", str(NGINX), "-p", str(folder), "-e", "stderr", *options]
    else:
        own = addresses(HAPROXY)[0]
        command = [program, "-db", "-f", str(HAPROXY)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    host, _, port = own.partition(":")
    try:
        until(lambda: process.poll() is not None or _listens(host, int(port)))
        assert process.poll() is None, process.communicate()[1]
        yield own
    finally:
        process.terminate()
        process.communicate(timeout=30)


def _listens(host: str, port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((host, port)) == 0


@pytest.fixture(params=["nginx", "haproxy"])
def running(request: pytest.FixtureRequest, linear: Path, tmp_path: Path) -> Iterator[tuple[Replicas, Load]]:
    """Three servers behind a proxy, and a load through it that has not started."""
    _, hosts, port = addresses(NGINX if request.param == "nginx" else HAPROXY)
    with (
        Replicas(linear, hosts, "--max-connection-age", "10", port=port) as replicas,
        proxy(request.param, tmp_path) as own,
        load_on(own, len(hosts)) as load,
    ):
        yield replicas, load


def test_each_of_three_servers_gets_a_third_of_30000_calls(running):
    replicas, load = running
    load.run(30_000)
    assert (load.answered, load.problems) == (30_000, [])
    print("shares of the servers, in percent:", [round(share, 1) for share in replicas.shares()])
    assert all(28 < share < 39 for share in replicas.shares())


def test_restarting_all_servers_one_after_another_loses_no_call(running):
    replicas, load = running
    restart_one_after_another(replicas, load)
    assert load.problems == []


def test_killing_a_server_loses_no_call(running):
    replicas, load = running
    kill_one(replicas, load)
    assert load.problems == []
