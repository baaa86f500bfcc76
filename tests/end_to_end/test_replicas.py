"""One client and several servers: the calls are divided equally, and none is lost when servers stop or die."""

import asyncio
import signal
from collections.abc import Iterator
from pathlib import Path

import dnslib
import pytest
from dnslib.server import BaseResolver, DNSServer

from service.client import AsyncClient
from tests.end_to_end.replicas import Load, Replicas, kill_one, load_on, restart_one_after_another
from tests.service.conftest import until
from tests.service.exports import pictures

HOSTS = ("127.0.0.2", "127.0.0.3", "127.0.0.4")
NAME = "classifier.test"


@pytest.fixture
def replicas(linear: Path) -> Iterator[Replicas]:
    with Replicas(linear, HOSTS) as running:
        yield running


@pytest.fixture
def load(replicas: Replicas) -> Iterator[Load]:
    with load_on(replicas.target, len(HOSTS)) as running:
        yield running


@pytest.mark.slow
def test_each_of_three_servers_gets_a_third_of_30000_calls(replicas, load):
    load.run(30_000)
    assert (load.answered, load.problems) == (30_000, [])
    assert sum(replica.classified() for replica in replicas.all) == 30_000
    print("shares of the servers, in percent:", [round(share, 1) for share in replicas.shares()])
    assert all(28 < share < 39 for share in replicas.shares())


def test_each_of_three_servers_gets_a_third_of_the_calls_of_an_asyncio_client(replicas):
    async def call() -> None:
        async with AsyncClient(replicas.target) as client:
            for _ in range(30):
                await asyncio.gather(*(client.classify(pictures(1)) for _ in range(30)))

    asyncio.run(call())
    assert all(28 < share < 39 for share in replicas.shares())


@pytest.mark.slow
def test_restarting_all_servers_one_after_another_loses_no_call(replicas, load):
    restart_one_after_another(replicas, load)
    assert load.problems == []


@pytest.mark.slow
def test_killing_a_server_loses_no_call(replicas, load):
    kill_one(replicas, load)
    assert load.problems == []


@pytest.mark.slow
def test_a_server_that_stops_answering_without_closing_its_connections_loses_no_call(replicas, load):
    # As if the machine lost its power: only the client's own pings notice it.
    with load.running():
        load.wait_for_more(500)
        replicas.all[0].server.process.send_signal(signal.SIGSTOP)
        # All threads wait for that server until its connection is given up, and then go on with the other two.
        load.wait_for_more(20_000)
    assert load.problems == []


class Zone(BaseResolver):
    """A DNS zone with one name, whose addresses can change."""

    def __init__(self, addresses: tuple[str, ...]) -> None:
        self.addresses = list(addresses)
        self.questions = 0

    def resolve(self, request: dnslib.DNSRecord, _handler: object) -> dnslib.DNSRecord:
        reply = request.reply()
        if dnslib.QTYPE[request.q.qtype] == "A" and str(request.q.qname).rstrip(".") == NAME:
            self.questions += 1
            for address in self.addresses:
                reply.add_answer(dnslib.RR(NAME, dnslib.QTYPE.A, rdata=dnslib.A(address), ttl=1))
        return reply


@pytest.fixture
def zone() -> Iterator[Zone]:
    resolver = Zone(HOSTS)
    server = DNSServer(resolver, address="127.0.0.1", port=0)
    resolver.port = server.server.server_address[1]
    server.start_thread()
    try:
        yield resolver
    finally:
        server.stop()
        server.server.server_close()


@pytest.mark.slow
def test_a_server_that_is_added_to_the_name_gets_its_share_within_the_connection_age(linear, zone):
    with Replicas(linear, HOSTS, "--max-connection-age", "10") as replicas:
        target = f"dns://127.0.0.1:{zone.port}/{NAME}:{replicas.port}"
        with load_on(target, 4) as load, load.running():
            load.wait_for_more(3_000)
            assert all(28 < share < 39 for share in replicas.shares())
            fourth = replicas.add("127.0.0.5")
            zone.addresses.append("127.0.0.5")
            # gRPC varies the age by a tenth.
            until(lambda: fourth.classified() > 0, seconds=11 + 2)
            before = [replica.classified() for replica in replicas.all]
            load.wait_for_more(10_000)
            new = [replica.classified() - count for replica, count in zip(replicas.all, before, strict=True)]
            shares = [100 * count / sum(new) for count in new]
            print("shares of the servers, in percent:", [round(share, 1) for share in shares])
            assert all(20 < share < 30 for share in shares)

            # And a server that is removed from the name, as Kubernetes does before it stops a pod.
            zone.addresses.remove(HOSTS[0])
            assert replicas.all[0].server.stop() == 0
            load.wait_for_more(1_000)
        assert load.problems == []
