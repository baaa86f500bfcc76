import functools
import socket
import sys
import threading

import pytest

from service.errors import StartError
from service.ports import check_free, hold_new_connections, listen, reserve

UNASSIGNED = "2001:db8::1"  # reserved for documentation: no machine has it


@pytest.fixture
def listener():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening


def resolve_to(monkeypatch, *hosts: str) -> None:
    """Makes every name resolve to these addresses."""
    real = socket.getaddrinfo

    def resolve(_host: str, port: int, **options: int) -> list[object]:
        return [address for host in hosts for address in real(host, port, **options)]

    monkeypatch.setattr("socket.getaddrinfo", resolve)


def test_a_port_that_somebody_listens_on_is_named(listener):
    port = listener.getsockname()[1]
    with pytest.raises(StartError, match=f"port {port} of 127.0.0.1 is already in use"):
        check_free("127.0.0.1", port)


@pytest.mark.parametrize("host", ["no-such-host.invalid", "x" * 64 + ".invalid"])
def test_a_name_that_does_not_resolve_is_refused_in_one_line(host):
    with pytest.raises(StartError, match=f"cannot listen on {host}: ") as caught:
        check_free(host, 0)
    assert "\n" not in str(caught.value)


def test_an_address_that_the_machine_does_not_have_is_skipped_if_another_can_be_bound(monkeypatch, listener):
    resolve_to(monkeypatch, UNASSIGNED, "127.0.0.1")  # as localhost does where IPv6 is off
    check_free("localhost", 0)
    with reserve("localhost", 0) as port:
        assert port
    with pytest.raises(StartError, match="is already in use"):
        check_free("localhost", listener.getsockname()[1])


def test_an_address_that_a_name_resolves_to_twice_is_reserved_once(monkeypatch):
    with reserve("127.0.0.1", 0) as port:
        pass
    resolve_to(monkeypatch, "127.0.0.1", "127.0.0.1")
    with reserve("localhost", port) as same:
        assert same == port


def test_a_host_without_any_address_of_the_machine_is_refused():
    with pytest.raises(StartError, match=f"port 50051 of {UNASSIGNED} cannot be used: "):
        check_free(UNASSIGNED, 50051)


def test_a_reserved_port_is_kept_and_can_be_shared():
    with reserve("127.0.0.1", 0) as port:
        with socket.socket() as stranger, pytest.raises(OSError, match="in use"):
            stranger.bind(("127.0.0.1", port))
        with socket.socket() as worker:
            worker.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            worker.bind(("127.0.0.1", port))


@pytest.mark.parametrize(
    ("first", "second", "both"),
    [
        ("127.0.0.1", "127.0.0.1", False),
        ("127.0.0.1", "localhost", False),
        ("127.0.0.1", "0.0.0.0", False),  # noqa: S104
        ("0.0.0.0", "127.0.0.1", False),  # noqa: S104
        ("0.0.0.0", "::", False),  # noqa: S104 -- gRPC listens on both families
        ("127.0.0.1", "127.0.0.2", True),
    ],
)
def test_a_reserved_port_cannot_be_reserved_again_where_the_addresses_overlap(first, second, both):
    with reserve(first, 0, for_grpc=True) as port:
        again = functools.partial(reserve, second, port, for_grpc=True)
        if both:
            with again() as same:
                assert same == port
            return
        for _ in range(2):  # an attempt does not open it
            with pytest.raises(StartError, match=f"port {port} of {second} is already in use"), again():
                pass
    with again():  # it is free again
        pass


def test_http_on_all_addresses_of_a_family_does_not_meet_the_other_family():
    with reserve("0.0.0.0", 0) as port, reserve("::", port) as same:  # noqa: S104
        assert same == port


def test_a_reserved_port_is_not_free():
    with reserve("127.0.0.1", 0) as port:
        with pytest.raises(StartError, match=f"port {port} of 127.0.0.1 is already in use"):
            check_free("127.0.0.1", port)
        for listener in listen("127.0.0.1", port, shares_port=True):
            listener.close()
        with pytest.raises(StartError, match="is already in use"), reserve("127.0.0.1", port):
            pass


def test_of_many_that_reserve_a_port_at_once_one_succeeds():
    together = threading.Barrier(8, timeout=60)

    def attempt(port: int, outcomes: list[str]) -> None:
        together.wait()
        try:
            with reserve("127.0.0.1", port):
                outcomes.append("reserved")
                together.wait()
        except StartError:
            outcomes.append("in use")
            together.wait()

    with reserve("127.0.0.1", 0) as free:
        pass
    for _ in range(20):
        outcomes: list[str] = []
        threads = [threading.Thread(target=attempt, args=(free, outcomes)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(outcomes) == ["in use"] * 7 + ["reserved"]


@pytest.mark.skipif(sys.platform != "linux", reason="needs the filters of Linux")
@pytest.mark.parametrize(("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_held_connections_are_refused_and_not_reset_when_the_listener_closes(family, host):
    try:
        listening = socket.create_server((host, 0), family=family, backlog=8)
    except OSError:
        pytest.skip(f"this machine has no {host}")
    port = listening.getsockname()[1]
    outcomes = []

    def connect() -> None:
        try:
            with socket.create_connection((host, port), timeout=30) as client:
                client.sendall(b"request")
                outcomes.append(client.recv(100))
        except OSError as error:
            outcomes.append(error)

    with listening:
        earlier = socket.create_connection((host, port))
        hold_new_connections(listening)
        later = threading.Thread(target=connect)
        later.start()
        accepted, _ = listening.accept()  # it arrived before
        listening.settimeout(0.2)
        with pytest.raises(TimeoutError):
            listening.accept()
        assert not outcomes
        with earlier, accepted:
            earlier.sendall(b"request")
            assert accepted.recv(100) == b"request"
    later.join()
    assert [type(outcome) for outcome in outcomes] == [ConnectionRefusedError]
