"""The unit file for systemd: what systemd itself says about it, and that it fits the server's own limits."""

import configparser
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from service.settings import Settings
from service.workers.supervisor import KILL_SECONDS
from tests.conftest import REPOSITORY

UNIT = REPOSITORY / "deploy/systemd/cifar-classifier.service"


class Options(configparser.ConfigParser):
    """Reads a unit file, in which names are case-sensitive and may be repeated."""

    def optionxform(self, optionstr: str) -> str:
        return optionstr


@pytest.fixture(scope="module")
def unit() -> configparser.ConfigParser:
    options = Options(strict=False, interpolation=None, delimiters=("=",), comment_prefixes=("#",))
    options.read_string(UNIT.read_text())
    return options


def test_the_server_has_its_grace_period_before_systemd_kills_it(unit):
    service = unit["Service"]
    variables = dict(variable.split("=") for variable in service["Environment"].split())
    grace = float(variables["CIFAR_SERVICE_GRACE"])
    assert float(service["TimeoutStopSec"]) > grace + KILL_SECONDS
    assert service["KillMode"] == "mixed"
    assert service["Restart"] == "always"


def test_every_variable_is_an_option_with_an_allowed_value(unit, monkeypatch):
    for variable in unit["Service"]["Environment"].split():
        name, value = variable.split("=")
        assert name.removeprefix("CIFAR_SERVICE_").lower() in Settings.model_fields
        monkeypatch.setenv(name, value)
    assert Settings().workers == 2


def test_the_usual_hardening_options_are_set(unit):
    service = unit["Service"]
    for name in ("NoNewPrivileges", "DynamicUser", "PrivateTmp", "ProtectHome", "MemoryDenyWriteExecute"):
        assert service[name] == "yes", name
    assert service["ProtectSystem"] == "strict"
    assert service["CapabilityBoundingSet"] == ""
    assert {"MemoryMax", "TasksMax", "LimitNOFILE"} <= set(service)
    assert "WatchdogSec" not in service  # the server does not notify systemd


@pytest.mark.parametrize("arguments", [["verify"], ["security", "--offline=true", "--threshold=20"]])
def test_systemd_accepts_it_and_finds_it_safe(tmp_path: Path, arguments: list[str]):
    analyze = shutil.which("systemd-analyze") or pytest.skip("needs systemd-analyze")
    here = tmp_path / UNIT.name
    here.write_text(UNIT.read_text().replace("/opt/cifar-classifier/bin/python", sys.executable))
    done = subprocess.run([analyze, *arguments, here], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
