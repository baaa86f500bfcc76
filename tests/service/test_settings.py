import subprocess
import sys

import pytest

from service.errors import StartError
from service.ports import is_loopback
from service.settings import Settings, parse
from tests.conftest import REPOSITORY


def test_without_options_it_listens_on_the_loopback_and_serves_the_shipped_model(monkeypatch):
    monkeypatch.delenv("CIFAR_SERVICE_PORT", raising=False)
    settings = parse([])
    assert (settings.host, settings.port, settings.workers) == ("127.0.0.1", 50051, 1)
    assert settings.model == REPOSITORY / "exported"


def test_a_flag_wins_over_the_variable_and_the_variable_over_the_default(monkeypatch):
    monkeypatch.setenv("CIFAR_SERVICE_MAX_BATCH_SIZE", "7")
    assert parse([]).max_batch_size == 7
    assert parse(["--max-batch-size", "9"]).max_batch_size == 9


def test_the_name_of_the_model_can_be_given_as_kserve_spells_it():
    assert parse([]).model_name == "cifar10"
    for arguments in (["--model-name", "pets"], ["--model_name", "pets"], ["--model_name=pets"], ["--model-name=pets"]):
        assert parse(arguments).model_name == "pets"


def test_every_option_has_a_meaning_and_stands_in_the_help():
    done = subprocess.run(
        [sys.executable, "-m", "service", "--help"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    for name, field in Settings.model_fields.items():
        assert field.description
        assert f"--{name.replace('_', '-')} " in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "65536"], "--port 65536: Input should be less than or equal to 65535"),
        (["--port", "http"], "--port http: Input should be a valid integer"),
        (["--workers", "0"], "--workers 0"),
        (["--max-queue-delay-ms", "-1"], "--max-queue-delay-ms -1"),
        (["--max-queue-delay-ms", "inf"], "--max-queue-delay-ms inf: Input should be less"),
        (["--max-batch-size", "3000000000"], "--max-batch-size 3000000000: Input should be less"),
        (["--host", "a\udcffb"], r"--host a\udcffb: 'a\udcffb' is neither a name nor an address"),
        (["--metrics-host", "a\nb"], r"--metrics-host a\nb: 'a\nb' is neither a name nor an address"),
        (["--model-name", "a/b"], "--model-name a/b: String should match pattern"),
        (["--model_name", ""], "--model-name : String should match pattern"),
        (["--model-name", "stats"], "--model-name stats: /v2/models/stats is the path of the statistics"),
        (["--port", "7", "--http-port", "7"], "--port and --http-port are both 7: give each a port of its own"),
        (["--http-port", "50051", "--http-host", "localhost"], "--port and --http-port are both 50051"),
        (["--port", "7", "--metrics-port", "7"], "--port and --metrics-port are both 7"),
        (["--http-port", "7", "--metrics-port", "7"], "--http-port and --metrics-port are both 7"),
        (["--device", "tpu"], "--device tpu: Input should be 'auto', 'cpu', 'cuda' or 'openvino'"),
        (["--bogus"], "unrecognized arguments: --bogus"),
        (["--port"], "expected one argument"),
        (["model"], "unrecognized arguments: model"),
        (["--host", "0.0.0.0"], "--host 0.0.0.0 is not a loopback address and TLS is off"),  # noqa: S104
        (["--host", "example.org"], "is not a loopback address"),
        (["--tls-cert", "cert.pem"], "--tls-cert and --tls-key belong together"),
        (["--tls-client-ca", "ca.pem"], "--tls-client-ca needs --tls-cert"),
        (["--max-images", "5000"], "--max-images 5000 is more than --max-queued-images 4096"),
        (["--metrics-port", "0", "--metrics-host", "0.0.0.0"], "--metrics-host 0.0.0.0 is not a loopback"),  # noqa: S104
        (["--max-message-bytes", "3000000000"], "--max-message-bytes 3000000000: Input should be less"),
        (["--max-receiving-bytes", "1000"], "is more than --max-receiving-bytes 1000"),
        (["--grace", "inf"], "--grace inf: Input should be less"),
        (["--threads", "3000000000"], "--threads 3000000000: Input should be less"),
        (["--max-decode-seconds", "1e300"], "--max-decode-seconds 1e300: Input should be less"),
        (["--max-image-bytes", "100000000000000000000"], "--max-image-bytes"),
        (["--max-queued-bytes", "1000"], "--max-message-bytes 8388608 is more than --max-queued-bytes 1000"),
    ],
)
def test_a_wrong_option_is_named_in_one_line(arguments, message):
    with pytest.raises(StartError) as caught:
        parse(arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_wrong_variable_is_named(monkeypatch):
    monkeypatch.setenv("CIFAR_SERVICE_PORT", "tcp://10.0.0.1:50051")
    with pytest.raises(StartError, match=r"--port tcp://10.0.0.1:50051 \(from CIFAR_SERVICE_PORT\): .*integer"):
        parse([])


def test_plaintext_beyond_the_loopback_is_served_when_asked_for_by_name():
    assert parse(["--host", "0.0.0.0", "--insecure"]).insecure  # noqa: S104
    assert parse(["--host", "0.0.0.0", "--tls-cert", "c", "--tls-key", "k"]).tls_cert  # noqa: S104


def test_several_ports_may_be_left_to_the_system():
    assert parse(["--port", "0", "--http-port", "0", "--metrics-port", "0"]).http_port == 0


def test_what_is_loopback():
    assert all(is_loopback(host) for host in ("127.0.0.1", "127.9.9.9", "localhost", "::1", "[::1]"))
    assert not any(is_loopback(host) for host in ("0.0.0.0", "::", "10.0.0.1", "localhost.example.org", ""))  # noqa: S104


def test_workers_share_the_cores(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    assert parse(["--workers", "2"]).engine_threads == 4
    assert parse(["--workers", "16"]).engine_threads == 1
    assert parse(["--workers", "2", "--threads", "3"]).engine_threads == 3


@pytest.mark.parametrize(
    ("option", "allowed", "refused"),
    [
        ("--max-queue-delay-ms", "60000", "60001"),
        ("--threads", "1024", "1025"),
        ("--decode-processes", "1024", "1025"),
        ("--max-batch-seconds", "0.001", "0"),
        ("--receive-timeout", "0.001", "0"),
    ],
)
def test_limits_of_numbers_are_those_that_the_error_names(option, allowed, refused):
    parse([option, allowed])
    with pytest.raises(StartError, match=f"{option} {refused}: Input should be (less|greater) than"):
        parse([option, refused])


def test_no_more_messages_are_received_at_once_than_fit_into_the_limit():
    assert parse(["--max-message-bytes", "1000", "--max-receiving-bytes", "2999"]).receiving_slots == 2
    assert parse(["--max-message-bytes", "1000", "--max-receiving-bytes", "1000"]).receiving_slots == 1
