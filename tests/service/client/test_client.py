"""The clients against a real server."""

import asyncio
import io
import os
import re
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image as PillowImage

from service.client import AsyncClient, ClassificationError, Client
from tests.conftest import REPOSITORY
from tests.service.client.scripted import Scripted, row_in, row_of, serve
from tests.service.exports import CLASSES, expected, pictures

SAMPLES = REPOSITORY / "samples"


@pytest.fixture
def client(server):
    with Client(server.target) as client:
        yield client


def are_right(answers, images: np.ndarray) -> bool:
    """Whether every answer has the probabilities that the model computes for its image."""
    table = np.zeros((len(answers), len(CLASSES)))
    for row, answer in zip(table, answers, strict=True):
        for ranked in answer.classes:
            row[ranked.index] = ranked.probability
    return bool(np.abs(table - expected(0, images)).max() < 1e-5)


def test_an_image_may_be_a_path_bytes_a_pil_image_or_an_array(client, tmp_path):
    images = pictures(5)
    file = io.BytesIO()
    PillowImage.fromarray(images[0]).save(file, "PNG")
    path = tmp_path / "image.png"
    PillowImage.fromarray(images[1]).save(path)
    sources = [file.getvalue(), path, str(path), PillowImage.fromarray(images[2]), images[3]]
    answers = client.classify(sources)
    assert are_right(answers, images[[0, 1, 1, 2, 3]])
    assert answers[0].best.name == CLASSES[expected(0, images[:1]).argmax()]
    assert answers[0].model_version == "linear-0"


def test_an_array_of_another_size_is_resized_by_the_server(client):
    image = np.repeat(np.repeat(pictures(1)[0], 4, axis=0), 4, axis=1)
    assert client.classify([image, image])[0].classes


def test_a_large_array_is_sent_in_batches_and_answered_in_order(client, server):
    images = pictures(1500)  # the server takes 400 at once
    assert are_right(client.classify(images), images)
    probabilities = client.probabilities(images)
    assert probabilities.shape == (1500, 10)
    assert np.abs(probabilities - expected(0, images)).max() < 1e-5


def test_a_large_list_is_sent_in_batches_and_answered_in_order(client):
    images = pictures(1000)
    assert are_right(client.classify(list(images), top_k=10), images)


def test_batches_stay_below_the_servers_message_size(start_server, linear):
    server = start_server("--model", linear, "--max-message-bytes", "200000").ready()
    with Client(server.target) as client:
        images = pictures(300)
        assert are_right(client.classify(images), images)
        assert are_right(client.classify(list(images)), images)


def test_an_image_that_cannot_be_read_has_an_answer_that_says_so(client):
    bad, good = client.classify([b"no image", pictures(1)[0]])
    assert "its header is damaged: it begins with b'no image'" in bad.error
    with pytest.raises(ValueError, match=r"the image was not classified: .* its header is damaged"):
        _ = bad.best
    assert good.error is None


def classify(kind: type, target: str, images: list) -> list:
    async def use():
        async with AsyncClient(target) as client:
            return await client.classify(images)

    if kind is AsyncClient:
        return asyncio.run(use())
    with Client(target) as client:
        return client.classify(images)


def as_png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    PillowImage.fromarray(image).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_an_image_that_no_message_can_hold_has_an_answer_that_says_so(server, kind):
    good = as_png(pictures(1)[0])
    noise = np.random.default_rng(0).integers(0, 256, (1700, 1700, 3), np.uint8)  # a PNG file of 8.7 MB
    large = [noise, PillowImage.fromarray(noise), good + bytes(8 * 2**20), good + bytes(20 * 2**20)]
    answers = classify(kind, server.target, [image for one in large for image in (good, one)] + [good])
    assert are_right(answers[::2], pictures(1)[[0] * 5])
    for answer in answers[1::2]:
        assert "but must take at most 8387584 to fit into a message to the server; send a smaller image" in answer.error
        assert answer.model_version == "linear-0"
    # A little smaller, it is the server that refuses the image.
    assert "at most 8000000 are allowed" in classify(kind, server.target, [good + bytes(8_380_000)])[0].error


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_a_pil_image_that_cannot_be_encoded_has_an_answer_that_says_so(server, kind, tmp_path):
    PillowImage.fromarray(pictures(1)[0]).resize((200, 200)).save(tmp_path / "image.bmp")
    (tmp_path / "short.bmp").write_bytes((tmp_path / "image.bmp").read_bytes()[:500])
    good = pictures(1)[0]
    with PillowImage.open(tmp_path / "short.bmp") as truncated:
        bad = [PillowImage.new("F", (40, 40)), truncated, PillowImage.new("RGB", (0, 0)), np.zeros((0, 5, 3), np.uint8)]
        answers = classify(kind, server.target, [image for one in bad for image in (good, one)] + [good])
    assert are_right(answers[::2], pictures(1)[[0] * 5])
    errors = [answer.error for answer in answers[1::2]]
    assert "its mode is F, but must be one that has a defined conversion to RGB; convert it to RGB" in errors[0]
    assert "the PIL image cannot be encoded: image file is truncated" in errors[1]
    assert "the PIL image cannot be encoded" in errors[2]
    assert "the image is empty: 5 x 0 pixels" in errors[3]


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (["absent.png"], FileNotFoundError, r"absent\.png"),
        ("cat.png", TypeError, "a single str; it must be a list"),
        (pictures(1)[0], TypeError, "a single ndarray"),
        (pictures(2).astype(np.float32), ValueError, r"float32 \[2, 32, 32, 3\]; it must be uint8"),
        (np.zeros((2, 3, 32, 32), np.uint8), ValueError, r"uint8 \[2, 3, 32, 32\]"),
        ([np.zeros((32, 32), np.uint8)], ValueError, r"must be uint8 \[height, width, 3\]"),
        ([7], TypeError, "an image is int"),
        (None, TypeError, "images is None; it must be a list of images, or one array of many"),
        (7, TypeError, "images is 7; it must be a list"),
    ],
)
def test_what_is_not_an_image_is_refused_before_anything_is_sent(client, images, error, message):
    with pytest.raises(error, match=message):
        client.classify(images)


def test_a_negative_number_of_classes_is_refused(client):
    with pytest.raises(ValueError, match="top_k is -1; it must be the number of classes per image, or 0 for all"):
        client.classify(pictures(1), top_k=-1)


@pytest.mark.parametrize("top_k", ["3", None, 2.5, float("nan"), np.float32(2)])
def test_a_number_of_classes_that_is_not_whole_is_refused_before_anything_is_sent(top_k):
    servicer = Scripted()
    message = re.escape(f"top_k is {top_k!r}; it must be a whole number")
    with serve(servicer) as target, Client(target) as client, pytest.raises(TypeError, match=message):
        client.classify(pictures(1), top_k=top_k)
    assert not servicer.calls


def test_a_number_of_classes_may_be_any_whole_number(client):
    assert [len(client.classify(pictures(1), top_k=top_k)[0].classes) for top_k in (np.int64(3), 99)] == [3, 10]


def test_an_empty_list_has_no_answers(client):
    assert client.classify([]) == []
    assert client.probabilities(pictures(0)).shape == (0, len(CLASSES))  # so it can be joined with others


@pytest.mark.parametrize("images", [pictures(1)[0], pictures(2).astype(np.float32)], ids=["one image", "floats"])
def test_probabilities_are_given_for_arrays_of_raw_images_only(client, server, images):
    with pytest.raises(ValueError, match=r"must be uint8 \[n, 32, 32, 3\]"):
        client.probabilities(images)

    async def use():
        async with AsyncClient(server.target) as client:
            await client.probabilities(images)

    with pytest.raises(ValueError, match=r"must be uint8 \[n, 32, 32, 3\]"):
        asyncio.run(use())


def test_the_asyncio_client_gives_the_same_answers(server):
    async def test():
        async with AsyncClient(server.target) as client:
            images = pictures(900)
            assert are_right(await client.classify(images), images)
            assert are_right(await client.classify(list(images[:5])), images[:5])
            assert np.abs(await client.probabilities(images) - expected(0, images)).max() < 1e-5
            assert (await client.model()).version == "linear-0"
            with pytest.raises(ClassificationError, match="INTERNAL"):
                await client.classify(np.full((1, 32, 32, 3), 255, np.uint8))

    asyncio.run(test())


def test_a_proxy_in_the_environment_is_not_used_for_this_machine(server):
    environment = {key: value for key, value in os.environ.items() if "proxy" not in key.lower()}
    for module, arguments in (
        ("service.client", ["--server", server.target, SAMPLES / "cat.jpg"]),
        ("service.probe", [server.target]),
    ):
        done = subprocess.run(
            [sys.executable, "-m", module, *map(str, arguments)],
            cwd=REPOSITORY, env={**environment, "http_proxy": "http://127.0.0.1:1"}, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr


def test_an_async_client_may_be_made_before_the_event_loop_and_belongs_to_the_loop_of_its_first_call():
    with serve(Scripted()) as target:
        client = AsyncClient(target)

        async def call(number: int) -> None:
            assert row_in((await client.classify([b"%d" % number]))[0]) == row_of(b"%d" % number)

        with asyncio.Runner() as first, asyncio.Runner() as second:
            first.run(call(1))
            with pytest.raises(RuntimeError, match="was used in another event loop: make one in each event loop"):
                second.run(call(2))
            first.run(call(3))
            first.run(client.close())


def test_an_answer_that_arrives_while_the_event_loop_is_blocked_counts_after_the_deadline_too():
    servicer = Scripted()
    with serve(servicer) as target:

        async def main() -> None:
            async with AsyncClient(target) as client:
                await client.model()
                call = asyncio.create_task(client.classify([b"image"], timeout=1))
                while not servicer.calls:
                    await asyncio.sleep(0.01)
                time.sleep(1.5)  # a program that blocks its event loop
                assert row_in((await call)[0]) == row_of(b"image")

        asyncio.run(main())
