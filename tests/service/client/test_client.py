"""The clients against a real server."""

import asyncio
import io
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image as PillowImage

from service.client import AsyncClient, ClassificationError, Client
from tests.conftest import REPOSITORY
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
    ],
)
def test_what_is_not_an_image_is_refused_before_anything_is_sent(client, images, error, message):
    with pytest.raises(error, match=message):
        client.classify(images)


def test_a_negative_number_of_classes_is_refused(client):
    with pytest.raises(ValueError, match="top_k is -1; it must be the number of classes per image, or 0 for all"):
        client.classify(pictures(1), top_k=-1)


def test_an_empty_list_has_no_answers(client):
    assert client.classify([]) == []
    assert client.probabilities(pictures(0)).size == 0


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
