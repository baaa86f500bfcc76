import asyncio
import io
import json
import os
import socket
import subprocess
import sys
import threading
from concurrent import futures

import grpc
import numpy as np
import pytest
from PIL import Image as PillowImage

from service.client import AsyncClient, ClassificationError, Client, Options
from service.generated.cifar.v1 import image_classifier_pb2 as messages
from service.generated.cifar.v1 import image_classifier_pb2_grpc as rpc
from tests.conftest import REPOSITORY
from tests.service.exports import CLASSES, expected, pictures

SAMPLES = REPOSITORY / "samples"


@pytest.fixture
def client(server):
    with Client(server.target) as client:
        yield client


def right(answers, images: np.ndarray) -> bool:
    """Whether every answer is the model's for its image."""
    table = np.zeros((len(answers), len(CLASSES)))
    for row, answer in zip(table, answers, strict=True):
        for ranked in answer.classes:
            row[ranked.index] = ranked.probability
    return bool(np.abs(table - expected(0, images)).max() < 1e-5)


def test_paths_bytes_pil_images_and_arrays_are_all_images(client, tmp_path):
    images = pictures(5)
    file = io.BytesIO()
    PillowImage.fromarray(images[0]).save(file, "PNG")
    path = tmp_path / "image.png"
    PillowImage.fromarray(images[1]).save(path)
    sources = [file.getvalue(), path, str(path), PillowImage.fromarray(images[2]), images[3]]
    answers = client.classify(sources)
    assert right(answers, images[[0, 1, 1, 2, 3]])
    assert answers[0].best.name == CLASSES[expected(0, images[:1]).argmax()]
    assert answers[0].model_version == "linear-0"


def test_an_array_of_another_size_is_resized_by_the_server(client):
    image = np.repeat(np.repeat(pictures(1)[0], 4, axis=0), 4, axis=1)
    assert client.classify([image, image])[0].classes


def test_a_large_array_is_sent_in_batches_and_answered_in_order(client, server):
    images = pictures(1500)  # the server takes 400 at once
    assert right(client.classify(images), images)
    probabilities = client.probabilities(images)
    assert probabilities.shape == (1500, 10)
    assert np.abs(probabilities - expected(0, images)).max() < 1e-5


def test_a_large_list_is_sent_in_batches_too(client):
    images = pictures(1000)
    assert right(client.classify(list(images), top_k=10), images)


def test_batches_stay_below_the_servers_message_size(start_server, linear):
    server = start_server("--model", linear, "--max-message-bytes", "200000").ready()
    with Client(server.target) as client:
        images = pictures(300)
        assert right(client.classify(images), images)
        assert right(client.classify(list(images)), images)


def test_an_image_that_cannot_be_read_has_an_answer_that_says_so(client):
    bad, good = client.classify([b"no image", pictures(1)[0]])
    assert "no image in PNG" in bad.error
    with pytest.raises(ValueError, match="was not classified: this is no image"):
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
def test_what_is_no_image_is_told_before_anything_is_sent(client, images, error, message):
    with pytest.raises(error, match=message):
        client.classify(images)


def test_no_images_have_no_answers(client):
    assert client.classify([]) == []
    assert client.probabilities(pictures(0)).size == 0


def test_the_asyncio_client_gives_the_same(server):
    async def test():
        async with AsyncClient(server.target) as client:
            images = pictures(900)
            assert right(await client.classify(images), images)
            assert right(await client.classify(list(images[:5])), images[:5])
            assert np.abs(await client.probabilities(images) - expected(0, images)).max() < 1e-5
            assert (await client.model()).version == "linear-0"
            with pytest.raises(ClassificationError, match="INTERNAL"):
                await client.classify(np.full((1, 32, 32, 3), 255, np.uint8))

    asyncio.run(test())


def test_a_proxy_in_the_environment_is_not_asked_for_this_machine(server):
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


# Repeating


class Scripted(rpc.ImageClassifierServicer):
    """A server that fails as it is told, then answers."""

    def __init__(self, *failures: tuple[grpc.StatusCode, tuple[tuple[str, str], ...]]) -> None:
        self.failures = list(failures)
        self.calls = 0

    def GetModel(self, request, context):  # noqa: N802
        return messages.GetModelResponse(limits=messages.Limits(max_images=10, max_message_bytes=100_000))

    def Classify(self, request, context):  # noqa: N802
        self.calls += 1
        if self.failures:
            code, metadata = self.failures.pop(0)
            context.set_trailing_metadata(metadata)
            context.abort(code, "scripted")
        return messages.ClassifyResponse(results=[messages.ImageResult()] * (len(request.packed_rgb) // 3072))


def scripted(*failures: tuple[grpc.StatusCode, tuple[tuple[str, str], ...]]):
    servicer = Scripted(*failures)
    server = grpc.server(futures.ThreadPoolExecutor(4))
    rpc.add_ImageClassifierServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    return servicer, server, f"127.0.0.1:{port}"


HINT = (("grpc-retry-pushback-ms", "20"),)


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_what_the_server_could_not_take_is_sent_again(kind):
    servicer, server, target = scripted(
        (grpc.StatusCode.UNAVAILABLE, ()),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, HINT),
        (grpc.StatusCode.UNAVAILABLE, HINT),
    )

    async def use_async():
        async with AsyncClient(target) as client:
            return await client.classify(pictures(1))

    if kind is Client:
        with Client(target) as client:
            answers = client.classify(pictures(1))
    else:
        answers = asyncio.run(use_async())
    assert len(answers) == 1
    assert servicer.calls == 4
    server.stop(None)


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
def test_nothing_else_is_sent_again(code):
    servicer, server, target = scripted((code, ()))
    with Client(target) as client, pytest.raises(ClassificationError, match=f"{code.name}: scripted") as caught:
        client.classify(pictures(1))
    assert caught.value.code is code
    assert servicer.calls == 1
    server.stop(None)


def test_attempts_have_an_end():
    servicer, server, target = scripted(*[(grpc.StatusCode.UNAVAILABLE, ())] * 20)
    with Client(target, Options(attempts=3)) as client, pytest.raises(ClassificationError, match="UNAVAILABLE"):
        client.classify(pictures(1))
    assert servicer.calls == 3
    server.stop(None)


def test_the_deadline_holds_for_all_attempts_together():
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and says nothing
        target = f"127.0.0.1:{silent.getsockname()[1]}"
        done = threading.Event()
        with Client(target, Options(timeout=0.5)) as client:
            with pytest.raises(ClassificationError, match=r"DEADLINE_EXCEEDED|UNAVAILABLE"):
                client.classify(pictures(1))
            done.set()
    assert done.is_set()


# The command


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "service.client", *map(str, arguments)], cwd=REPOSITORY, capture_output=True, text=True
    )


def test_the_command_prints_a_table_with_bars(server):
    done = command("--server", server.target, SAMPLES / "cat.jpg", SAMPLES / "ship.png")
    assert done.returncode == 0
    assert "cat.jpg" in done.stdout
    assert "ship.png" in done.stdout
    assert "━" in done.stdout
    assert "model linear-0" in done.stdout


def test_the_command_prints_json_and_tells_by_its_exit_code_that_an_image_was_unreadable(server):
    done = command("--server", server.target, "--json", "--top-k", "1", SAMPLES / "cat.jpg", REPOSITORY / "LICENSE")
    assert done.returncode == 1
    good, bad = (json.loads(line) for line in done.stdout.splitlines())
    assert len(good["classes"]) == 1
    assert good["error"] is None
    assert "no image" in bad["error"]


def test_the_command_says_in_one_line_what_went_wrong():
    done = command("--server", "127.0.0.1:1", "--timeout", "1", SAMPLES / "cat.jpg")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    done = command("absent.png", "--server", "127.0.0.1:1", "--timeout", "1")
    assert done.returncode == 2
