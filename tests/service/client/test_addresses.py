"""Several servers behind one client: how they are named, and which of them gets a call."""

import grpc
import pytest
import trustme

from service.client import Client, Options
from service.client.addresses import Addresses
from tests.service.client.scripted import Scripted, serve
from tests.service.exports import pictures


@pytest.mark.parametrize(
    ("target", "grpc_target", "hosts"),
    [
        ("classifier.example:50051", "classifier.example:50051", ("classifier.example",)),
        ("[::1]:50051", "[::1]:50051", ("[::1]",)),
        ("dns:///classifier:50051", "dns:///classifier:50051", ("classifier",)),
        ("dns://127.0.0.1:53/classifier:50051", "dns://127.0.0.1:53/classifier:50051", ("classifier",)),
        ("10.0.0.1:1,10.0.0.2:2", "ipv4:10.0.0.1:1,10.0.0.2:2", ("10.0.0.1", "10.0.0.2")),
        ("10.0.0.1:1, 10.0.0.2:2", "ipv4:10.0.0.1:1,10.0.0.2:2", ("10.0.0.1", "10.0.0.2")),
        ("[::1]:1,[::2]:2", "ipv6:[::1]:1,[::2]:2", ("[::1]", "[::2]")),
        ("127.0.0.1:1", "127.0.0.1:1", ("127.0.0.1",)),
        ("127.0.0.1:65535", "127.0.0.1:65535", ("127.0.0.1",)),
    ],
)
def test_targets_are_one_address_several_addresses_or_a_name(target, grpc_target, hosts):
    addresses = Addresses.parse(target)
    assert (addresses.target, addresses.hosts) == (grpc_target, hosts)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("one.example:1,two.example:1", "'one.example:1' is not an IP address with a port.*dns:///NAME:PORT"),
        ("10.0.0.1:1,10.0.0.2", "'10.0.0.2' is not an IP address with a port"),
        ("10.0.0.1:1,", "'' is not an IP address with a port"),
        ("10.0.0.1:1,::1:2", "'::1:2' is not an IP address with a port"),
        ("10.0.0.1:1,[::1]:2", "mixes IPv4 and IPv6"),
    ],
)
def test_a_list_that_is_not_of_ip_addresses_is_refused(target, message):
    with pytest.raises(ValueError, match=message):
        Client(target)


@pytest.mark.parametrize(
    "target",
    [
        "dns:classifier:50051", "ipv4:127.0.0.1:50051", "ipv6:[::1]:50051", "ipv4:127.0.0.1:1,127.0.0.2:2",
        "unix:/run/classifier:1.sock", "unix:///run/a:b", "unix:/run/a,b.sock", "unix-abstract:classifier:0",
        "vsock:2:99999", "xds:///classifier:name",
    ],
)  # fmt: skip
def test_other_addresses_of_grpc_are_left_to_it(target):
    assert Addresses.parse(target).target == target


@pytest.mark.parametrize(
    "target",
    [
        "localhost", "127.0.0.1", "[::1]", "::1", "::1:5005", "[::1]50051", ":50051", "a:1:2", "dns:classifier",
        "dns:///classifier", "dns:///", "dns://127.0.0.1:53", "unix:", "unix:///", "http://127.0.0.1:50051",
        "127.0.0.1:50051/", "foo bar:50051", "dns:///10.0.0.1:1?/127.0.0.1:1", "dns:///10.0.0.1:1#/localhost:1",
        "10.0.0.1:1?127.0.0.1:1", "ipv4:127.0.0.1:50051?/127.0.0.1:1", "ipv4:127.0.0.1:99999",
    ],
)  # fmt: skip
def test_what_grpc_would_read_in_another_way_or_on_a_port_of_its_own_is_refused(target):
    with pytest.raises(ValueError, match=r"HOST:PORT|from 1 to 65535"):
        Client(target)


def test_the_kind_of_addresses_that_a_list_names_must_be_theirs():
    with pytest.raises(ValueError, match="are not of this kind"):
        Client("ipv6:127.0.0.1:1")


@pytest.mark.parametrize(
    ("target", "is_loopback"),
    [
        ("unix:/run/classifier.sock", True), ("unix-abstract:classifier", True), ("ipv4:127.0.0.1:1", True),
        ("ipv4:127.0.0.1:1,10.0.0.1:1", False), ("ipv6:[::1]:1", True), ("dns:127.0.0.1:1", True),
        ("dns:localhost:1", True), ("dns:///localhost:1", True), ("LOCALHOST:1", True), ("localhost.:1", True),
        ("dns://10.9.9.9/localhost:1", False), ("xds:///localhost:1", False), ("google-c2p:///localhost:1", False),
        ("vsock:1:1", False), ("localhost.example:1", False),
    ],
)  # fmt: skip
def test_a_token_is_sent_in_plaintext_to_this_machine_however_it_is_named(target, is_loopback):
    if is_loopback:
        Options(token="secret").check_safe(Addresses.parse(target))  # noqa: S106
    else:
        with pytest.raises(ValueError, match="without encryption"):
            Options(token="secret").check_safe(Addresses.parse(target))  # noqa: S106


@pytest.mark.parametrize("port", ["0", "-1", "65536", "99999", "1000000000000", "5e4", "٥", "", "http", " 1", "1]"])
@pytest.mark.parametrize("host", ["127.0.0.1", "classifier.example", "[::1]", "dns:///classifier"])
def test_a_port_that_is_none_is_named_with_its_range(host, port):
    with pytest.raises(ValueError, match="but must be a number from 1 to 65535") as caught:
        Client(f"{host}:{port}")
    assert str(caught.value).startswith(f"the port in {f'{host}:{port}'!r} is {port!r}, ")


@pytest.mark.parametrize("port", ["0", "65536", "http"])
def test_a_port_that_is_none_in_a_list_is_named(port):
    with pytest.raises(ValueError, match=f"the port in '10.0.0.2:{port}' is '{port}'"):
        Client(f"10.0.0.1:1, 10.0.0.2:{port}")


@pytest.mark.parametrize("target", ["", " "])
def test_an_empty_address_is_refused_before_grpc_sees_it(target, capfd):
    with pytest.raises(ValueError, match="the address of the server is empty: write HOST:PORT"):
        Client(target)
    assert capfd.readouterr().err == ""


def test_a_token_goes_in_plaintext_only_if_every_address_is_this_machine():
    options = Options(token="secret")  # noqa: S106
    with Client("127.0.0.1:1,127.0.0.2:1", options):
        pass
    for target in ("127.0.0.1:1,10.0.0.1:1", "dns:///classifier:50051", "dns://127.0.0.1:53/classifier:50051"):
        with pytest.raises(ValueError, match="without encryption"):
            Client(target, options)


def test_servers_take_turns():
    servers = [Scripted() for _ in range(3)]
    with (
        serve(servers[0]) as first,
        serve(servers[1]) as second,
        serve(servers[2]) as third,
        Client(f"{first},{second},{third}", Options(coalesce=False)) as client,
    ):
        _until_all_are_connected(client, servers)
        for server in servers:
            server.calls.clear()
        for number in range(30):
            client.classify([bytes([number])])
    assert [len(server.calls) for server in servers] == [10, 10, 10]


@pytest.mark.parametrize(
    "failure",
    [
        (grpc.StatusCode.UNAVAILABLE, ()),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, (("grpc-retry-pushback-ms", "1"),)),
        (grpc.StatusCode.CANCELLED, ()),
    ],
)
def test_a_call_that_one_server_cannot_accept_is_answered_by_another(failure):
    healthy, refusing = Scripted(), Scripted()
    with (
        serve(healthy) as first,
        serve(refusing) as second,
        Client(f"{first},{second}", Options(coalesce=False)) as client,
    ):
        _until_all_are_connected(client, [healthy, refusing])
        healthy.calls.clear()
        refusing.calls.clear()
        refusing.failures = [failure] * 10
        for number in range(10):
            client.classify([bytes([number])])
    # Every second attempt reached the server that refuses, and the next one the other server.
    assert len(healthy.calls) == 10
    assert 9 <= len(refusing.calls) <= 10


def test_tls_to_several_addresses_compares_the_name_that_is_given(start_server, linear, tmp_path):
    authority = trustme.CA()
    certificate = authority.issue_cert("classifier.test")
    certificate.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    certificate.private_key_pem.write_to_path(tmp_path / "key.pem")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    tls = ("--model", linear, "--tls-cert", tmp_path / "cert.pem", "--tls-key", tmp_path / "key.pem")
    servers = [start_server(*tls) for _ in range(2)]
    target = ",".join(server.ready().target for server in servers)

    with pytest.raises(ValueError, match="needs the name in their certificates: set server_name"):
        Client(target, Options(ca=tmp_path / "ca.pem"))
    with Client(target, Options(ca=tmp_path / "ca.pem", server_name="classifier.test")) as client:
        for _ in range(4):
            assert client.classify(pictures(1))[0].error is None
    options = Options(ca=tmp_path / "ca.pem", server_name="other.test", timeout=3)
    with Client(target, options) as client, pytest.raises(Exception, match="UNAVAILABLE"):
        client.classify(pictures(1))


def _until_all_are_connected(client: Client, servers: list[Scripted]) -> None:
    """Calls until every server has answered: the first calls go to the server that connects first."""
    for number in range(1000):
        if all(server.calls for server in servers):
            return
        client.classify([b"connect %d" % number])
    raise AssertionError("a server was never called")


def test_a_call_is_split_by_the_smallest_limit_of_all_servers():
    larger, smaller = Scripted(), Scripted()
    smaller.limits.max_images = 4
    with serve(larger) as first, serve(smaller) as second:
        for _ in range(4):
            with Client(f"{first},{second}", Options(coalesce=False)) as client:
                _until_all_are_connected(client, [larger, smaller])
                for _ in range(5):
                    assert all(answer.error is None for answer in client.classify(pictures(8)))


def test_shared_requests_are_counted_for_each_address():
    with Client("127.0.0.1:1,127.0.0.2:1,127.0.0.3:1", Options(max_shared_requests=2)) as client:
        assert client._shared_requests == 6
        assert client._window == 6  # and so are the requests of one call
