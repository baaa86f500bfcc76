"""Options that are refused because they would be unsafe or contradict each other."""

import decimal
import math
import re
import subprocess
import sys

import pytest

from service.client import AsyncClient, Client, Options
from service.client.addresses import Addresses
from service.client.options import channel_options, read_token
from tests.conftest import REPOSITORY


@pytest.mark.parametrize("kind", [Client, AsyncClient])
@pytest.mark.parametrize("target", ["classifier.example:50051", "10.1.2.3:50051", "[2001:db8::1]:50051"])
def test_a_token_is_not_sent_in_plaintext_to_another_machine(kind, target):
    with pytest.raises(ValueError, match=r"without encryption: use TLS .* allow_plaintext_token=True") as caught:
        kind(target, Options(token="secret"))  # noqa: S106
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("target", "options"),
    [
        ("127.0.0.1:50051", {}),
        ("localhost:50051", {}),
        ("[::1]:50051", {}),
        ("classifier.example:50051", {"tls": True}),
        ("classifier.example:50051", {"allow_plaintext_token": True}),
    ],
)
def test_a_token_may_stay_on_this_machine_or_be_encrypted_or_be_allowed_by_name(target, options):
    with Client(target, Options(token="secret", **options)):  # noqa: S106
        pass


def test_the_token_is_not_shown():
    assert "secret" not in repr(Options(token="secret"))  # noqa: S106


@pytest.mark.parametrize("token", ["geheim-ü", "secret\nsecond", "\ufeffsecret", "secret\x7f", "secret\t"])
def test_a_token_that_cannot_be_sent_is_refused_and_not_shown(token):
    with pytest.raises(ValueError, match="must consist of printable ASCII characters") as caught:
        Options(token=token)
    assert not any(part in str(caught.value) for part in ("geheim", "secret", "second"))


@pytest.mark.parametrize("timeout", [float("nan"), -1, float("-inf"), "3"])
def test_a_time_limit_that_is_none_is_refused(timeout):
    with pytest.raises(ValueError, match=f"timeout is {timeout!r}, but must be a number of seconds, 0 or more"):
        Options(timeout=timeout)


@pytest.mark.parametrize(("given", "missing"), [("key", "certificate"), ("certificate", "key")])
def test_a_certificate_and_its_key_go_together(given, missing, tmp_path):
    with pytest.raises(ValueError, match=f"{given} is given without {missing}"):
        Options(**{given: tmp_path / "file.pem"})


@pytest.mark.parametrize("name", ["attempts", "max_shared_requests"])
def test_at_least_one_attempt_and_one_request_are_needed(name):
    for value in (0, 1.5, math.nan, "3"):
        with pytest.raises(ValueError, match=re.escape(f"{name} is {value!r}; it must be a whole number, at least 1")):
            Options(**{name: value})


def test_a_file_that_is_no_pem_file_is_named(tmp_path):
    (tmp_path / "ca.pem").write_text("text")
    with pytest.raises(ValueError, match=r"ca\.pem is not a PEM file"):
        Client(options=Options(ca=tmp_path / "ca.pem"))
    with pytest.raises(FileNotFoundError, match=r"absent\.pem"):
        Client(options=Options(ca=tmp_path / "absent.pem"))


def test_the_first_token_of_a_file_is_read(tmp_path):
    (tmp_path / "tokens").write_text("# for the web site\n\n first \nsecond\n")
    assert read_token(tmp_path / "tokens") == "first"
    (tmp_path / "tokens").write_text("# none\n")
    with pytest.raises(ValueError, match="tokens holds no token"):
        read_token(tmp_path / "tokens")


def test_a_proxy_is_used_for_other_machines_only():
    assert ("grpc.enable_http_proxy", 0) in channel_options(Addresses.parse("localhost:1"))
    assert ("grpc.enable_http_proxy", 0) not in channel_options(Addresses.parse("classifier.example:1"))


def test_importing_the_package_loads_neither_grpc_nor_numpy():
    code = (
        "import sys, service\n"
        "assert not {'grpc', 'numpy', 'PIL'} & set(sys.modules), 'imported'\n"
        "from service import Client, AsyncClient\n"
        "import service.client\n"
        "assert (Client, AsyncClient) == (service.client.Client, service.client.AsyncClient)\n"
        "assert 'torch' not in sys.modules\n"
        "try: service.absent\n"
        "except AttributeError: pass\n"
        "else: raise SystemExit('no error')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_values_of_other_types_are_refused():
    with pytest.raises(ValueError, match=r"the token is of type bytes; it must be a str"):
        Options(token=b"secret")
    with pytest.raises(ValueError, match=r"timeout is .*NaN.*, but must be a number of seconds"):
        Options(timeout=decimal.Decimal("nan"))
