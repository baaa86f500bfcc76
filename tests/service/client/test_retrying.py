"""What the client sends again, what it does not, and how long it tries."""

import asyncio
import socket
import time

import grpc
import numpy as np
import pytest

from service.client import AsyncClient, ClassificationError, Client, Options
from service.client.retrying import Attempts, Deadline, RequestFailed
from service.generated.cifar.v1 import image_classifier_pb2 as messages
from tests.service.client.scripted import Scripted, row_in, row_of, serve
from tests.service.exports import pictures

UNAVAILABLE, EXHAUSTED = grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED


def pushback(value: str) -> tuple[tuple[str, str], ...]:
    return (("grpc-retry-pushback-ms", value),)


def classify(kind: type, target: str, images: np.ndarray, call: dict | None = None, **options: object) -> list:
    """The answers of one of the two clients."""

    async def use_async():
        async with AsyncClient(target, Options(**options)) as client:
            return await client.classify(images, **(call or {}))

    if kind is AsyncClient:
        return asyncio.run(use_async())
    with Client(target, Options(**options)) as client:
        return client.classify(images, **(call or {}))


def rows_in(answers: list) -> list[str]:
    return [row_in(answer) for answer in answers]


def right_rows(images: np.ndarray) -> list[str]:
    return [row_of(image.tobytes()) for image in images]


both_clients = pytest.mark.parametrize("kind", [Client, AsyncClient])


@both_clients
def test_a_request_that_the_server_could_not_take_is_sent_again(kind):
    servicer = Scripted((UNAVAILABLE, ()), (EXHAUSTED, pushback("20")), (UNAVAILABLE, pushback("20")))
    with serve(servicer) as target:
        assert len(classify(kind, target, pictures(1))) == 1
    assert servicer.calls == [1] * 4


@both_clients
@pytest.mark.parametrize(
    "code",
    [
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.RESOURCE_EXHAUSTED,  # without a hint: a message that is too large
    ],
)
def test_a_request_that_would_fail_again_is_not_sent_again(kind, code):
    servicer = Scripted((code, ()))
    with serve(servicer) as target, pytest.raises(ClassificationError, match=f"{code.name}: scripted") as caught:
        classify(kind, target, pictures(1))
    assert caught.value.code is code
    assert servicer.calls == [1]


@both_clients
@pytest.mark.parametrize("value", ["-1", "soon", ""])
def test_a_negative_or_malformed_hint_means_do_not_send_again(kind, value):
    servicer = Scripted((UNAVAILABLE, pushback(value)))
    with serve(servicer) as target, pytest.raises(ClassificationError, match="UNAVAILABLE: scripted"):
        classify(kind, target, pictures(1))
    assert servicer.calls == [1]


@both_clients
def test_the_number_of_attempts_is_limited(kind):
    servicer = Scripted(*[(UNAVAILABLE, ())] * 20)
    with serve(servicer) as target, pytest.raises(ClassificationError, match="UNAVAILABLE"):
        classify(kind, target, pictures(1), attempts=3)
    assert len(servicer.calls) == 3


def test_pauses_grow_and_follow_the_servers_hint():
    attempts = Attempts(10, Deadline(None))
    pauses = [attempts.pause_after(RequestFailed(UNAVAILABLE, "", "5000" if turn == 0 else None)) for turn in range(9)]
    assert 5.02 < pauses[0] < 5.1
    assert 0.05 <= pauses[1] <= 0.15
    assert 1 <= pauses[8] <= 3
    with pytest.raises(RequestFailed):
        attempts.pause_after(RequestFailed(UNAVAILABLE, ""))


def test_no_pause_outlasts_the_deadline():
    with pytest.raises(RequestFailed):
        Attempts(10, Deadline(1)).pause_after(RequestFailed(UNAVAILABLE, "", "1500"))


@both_clients
def test_the_timeout_holds_for_the_first_call_too(kind):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and never answers
        target = f"127.0.0.1:{silent.getsockname()[1]}"

        began = time.monotonic()
        with pytest.raises(ClassificationError, match=r"DEADLINE_EXCEEDED|UNAVAILABLE"):
            classify(kind, target, pictures(1), call={"timeout": 0.3})
        assert time.monotonic() - began < 3  # the options' own timeout is 60 s


# Limits that changed since the client asked for them


@both_clients
@pytest.mark.parametrize(
    "lower",
    [
        messages.Limits(max_images=3, max_message_bytes=100_000),
        messages.Limits(max_images=10, max_message_bytes=12_000),
    ],
    ids=["fewer images", "smaller messages"],
)
def test_a_request_that_became_too_large_is_sent_again_in_smaller_ones(kind, lower):
    servicer = Scripted()
    images = pictures(23)

    async def use_async(target):
        async with AsyncClient(target) as client:
            await client.model()
            servicer.limits = lower
            return rows_in(await client.classify(images)), rows_in(await client.classify(images))

    with serve(servicer) as target:
        if kind is AsyncClient:
            first, second = asyncio.run(use_async(target))
        else:
            with Client(target) as client:
                client.model()
                servicer.limits = lower
                first, second = rows_in(client.classify(images)), rows_in(client.classify(images))
    assert first == second == right_rows(images)
    assert sorted(servicer.calls[-8:]) == [2] + [3] * 7  # the new limits are known by then


def test_a_request_within_the_limits_is_not_sent_again_after_they_were_asked_for():
    servicer = Scripted((grpc.StatusCode.INVALID_ARGUMENT, ()))
    with serve(servicer) as target, Client(target) as client:
        with pytest.raises(ClassificationError, match="INVALID_ARGUMENT: scripted"):
            client.classify(pictures(5))
        assert (servicer.calls, servicer.model_calls) == ([5], 2)


def test_pauses_vary_so_that_clients_do_not_return_together():
    pauses = [Attempts(10, Deadline(None)).pause_after(RequestFailed(UNAVAILABLE, "")) for _ in range(100)]
    assert max(pauses) - min(pauses) > 0.02
    assert all(0.025 <= pause <= 0.075 for pause in pauses)


def test_any_number_of_attempts_is_made():
    attempts = Attempts(3000, Deadline(None))
    assert all(attempts.pause_after(RequestFailed(UNAVAILABLE, "")) <= 3 for _ in range(2999))
    with pytest.raises(RequestFailed):
        attempts.pause_after(RequestFailed(UNAVAILABLE, ""))
