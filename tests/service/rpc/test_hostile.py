"""Hostile clients against a server with its default options: the figures of the table hold (see tests/attacks/rows.py).

The slow tests have the sizes of the table, the fast ones are smaller.
"""

import time
from collections.abc import Iterator

import pytest

from tests.attacks import catalogue, image_bombs, payloads, rows, rude_calls
from tests.attacks.http2 import MODEL_INFER
from tests.attacks.measured import Measured
from tests.attacks.observers import REPOSITORY, HonestClients, MemoryWatch
from tests.attacks.server import AttackedServer
from tests.attacks.stalls import StalledMessages

MIB = 2**20
REFUSED = {"INVALID_ARGUMENT", "NOT_FOUND", "RESOURCE_EXHAUSTED"}


@pytest.fixture
def attacked() -> Iterator[AttackedServer]:
    with AttackedServer(REPOSITORY) as server:
        server.ready()
        with HonestClients(server.victim, clients=4, pause=0.0):
            time.sleep(1.0)  # so that what is allocated once is allocated
        yield server
        assert server.answers(), server.log
        assert "Traceback" not in server.log


def check(measured: list[Measured]) -> None:
    """All limits hold."""
    print("; ".join(each.text for each in measured))
    assert [f"{each.text}, limit {each.limit_text}" for each in measured if not each.holds] == []


# Images


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in rows.ISSUE if "JPEG" in name or "BMP" in name or "PNG" in name])
def test_an_expensive_image_file_delays_no_honest_client(attacked, name):
    check(rows.ISSUE[name](attacked))


def test_a_jpeg_of_many_scans_delays_no_honest_client(attacked):
    check(rows.image_bomb(attacked, [[image_bombs.progressive_jpeg(scans=300)]] * 2))


def test_a_run_length_bmp_delays_no_honest_client(attacked):
    check(rows.image_bomb(attacked, [[image_bombs.run_length_bmp()] * 2]))


def test_16_bit_png_files_delay_no_honest_client_and_hold_little_memory(attacked):
    check(rows.image_bomb(attacked, [[image_bombs.png()] * 4]))


@pytest.mark.slow
@pytest.mark.parametrize("name", catalogue.FILES)
def test_no_expensive_file_of_any_format_delays_honest_clients(attacked, name):
    check(rows.flood(attacked, catalogue.FILES[name]))


# Messages


@pytest.mark.slow
@pytest.mark.parametrize("name", payloads.BODIES)
def test_a_message_of_8_megabytes_that_is_expensive_to_parse_causes_no_stall(attacked, name):
    check(rows.large_body(attacked, name))


@pytest.mark.parametrize("size", [payloads.LIMIT // 2, payloads.LIMIT, payloads.OLD_LIMIT])
def test_millions_of_empty_images_are_refused_without_a_stall(attacked, size):
    check(rows.large_body(attacked, "empty images", size, tries=2))


@pytest.mark.parametrize("name", [*payloads.LONG_TEXTS, "a long model name"])
def test_a_text_of_8_megabytes_is_refused(attacked, name):
    method, body = payloads.body(name)
    assert set(rude_calls.send_bodies(attacked.victim, method, [body])) <= REFUSED


@pytest.mark.slow
def test_many_long_texts_hold_little_memory(attacked):
    check(rows.many_long_texts(attacked, payloads.LIMIT))


# Messages that never end


@pytest.mark.slow
def test_200_connections_stalled_in_8_mebibytes_are_ended_and_hold_little_memory(attacked):
    check(rows.stalled_messages(attacked, connections=200, streams=1, size=8 * MIB))


@pytest.mark.slow
def test_1800_streams_stalled_in_3_9_mebibytes_are_ended_and_hold_little_memory(attacked):
    check(rows.stalled_messages(attacked, connections=20, streams=90, size=int(3.9 * MIB)))


def test_90_connections_stalled_in_8_mebibytes_are_ended_and_hold_little_memory(attacked):
    check(rows.stalled_messages(attacked, connections=90, streams=1, size=8 * MIB))


def test_stalled_messages_of_the_open_inference_protocol_are_ended(attacked):
    stalled = StalledMessages(attacked.victim, 5, 20, 8 * MIB, MODEL_INFER)
    with MemoryWatch(attacked.pid) as watch, stalled:
        stalled.wait_until_stalled()
        assert stalled.wait_until_ended(rows.RECOVERY_SECONDS) is not None
    assert watch.peak < rows.PEAK_MIB


# Floods


@pytest.mark.slow
def test_resetting_100_000_streams_fails_no_honest_call(attacked):
    check(rows.rapid_reset(attacked))


def test_resetting_30_000_streams_fails_no_honest_call(attacked):
    # Other tests run beside this one, so only a standstill fails it. The slow test has the limit of the table.
    check(rows.rapid_reset(attacked, streams=30_000, seconds=1.5, share=0.1))


def test_500_cancelled_streams_leave_no_task(attacked):
    check(rows.cancelled_streams(attacked))


@pytest.mark.slow
@pytest.mark.parametrize("name", {**catalogue.FLOODS, **catalogue.STALLS})
def test_no_flood_fails_an_honest_call(attacked, name):
    check(rows.flood(attacked, {**catalogue.FLOODS, **catalogue.STALLS}[name]))
