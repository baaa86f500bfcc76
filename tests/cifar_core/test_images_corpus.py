"""Training and serving see the same pixels: the same files through the folder loader and through a running server."""

import hashlib
from collections import Counter
from pathlib import Path

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray

from cifar_core.data import load_dataset
from cifar_core.images import decode
from cifar_core.pixels import EXTENSIONS
from service.generated.cifar.v1 import image_classifier_pb2 as messages
from service.generated.cifar.v1 import image_classifier_pb2_grpc as rpc
from tests.cifar_core.image_corpus import ORIENTATIONS, CorpusFile, corpus
from tests.service.conftest import Server
from tests.service.exports import BYTES, pixels_as_probabilities, write_export


@pytest.fixture(scope="module")
def files() -> list[CorpusFile]:
    return corpus()


def through_folder_loader(files: list[CorpusFile], folder: Path) -> NDArray[np.uint8]:
    for index, file in enumerate(files):
        path = folder / "train" / "a" / f"{index:04d}.{file.extension}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file.content)
    for place in ("train/b", "test/a", "test/b"):  # a data set has two classes and two splits
        (folder / place).mkdir(parents=True)
        (folder / place / "0.png").write_bytes(files[0].content)
    train = load_dataset(str(folder)).train
    return train.images[train.labels == 0].numpy()


def through_server(files: list[CorpusFile], export: Path) -> NDArray[np.uint8]:
    server = Server("--model", export).ready()
    try:
        with grpc.insecure_channel(server.target, [("grpc.max_receive_message_length", -1)]) as channel:
            images = [messages.Image(encoded=file.content) for file in files]
            answer = rpc.ImageClassifierStub(channel).Classify(messages.ClassifyRequest(images=images), timeout=60)
    finally:
        assert server.stop() == 0, server.log
    probabilities = np.empty((len(files), BYTES + 1))
    for row, result, file in zip(probabilities, answer.results, files, strict=True):
        assert not result.HasField("error"), (file.kind, result.error)
        for ranked in result.classes:
            row[ranked.index] = ranked.probability
    values = probabilities[:, :-1] / probabilities[:, -1:] - 1
    assert np.abs(values - values.round()).max() < 0.01
    return values.round().astype(np.uint8).reshape(-1, 32, 32, 3)


def test_training_and_serving_see_the_same_pixels_of_every_file(files, tmp_path):
    classes = [str(index) for index in range(BYTES + 1)]
    export = write_export(tmp_path / "export", pixels_as_probabilities(), classes=classes)
    trained_on, served = through_folder_loader(files, tmp_path / "data"), through_server(files, export)
    assert len(trained_on) == len(served) == len(files)
    different = [
        (file.kind, file.extension)
        for file, ours, theirs in zip(files, trained_on, served, strict=True)
        if (ours != theirs).any()
    ]
    assert different == []
    digests = {hashlib.sha256(image.tobytes()).digest() for image in served}
    assert len(digests) > len(files) // 4  # the files do show different pictures
    kinds = Counter((file.extension, file.kind) for file in files)
    print(f"{len(files)} files of {len(kinds)} kinds compared byte by byte")


def test_the_corpus_holds_every_format_mode_and_orientation(files):
    assert len(files) >= 200
    assert {f".{file.extension}" for file in files} == set(EXTENSIONS) - {".apng", ".jfif", ".jpe"}  # other names
    kinds = {file.kind for file in files}
    assert {f"EXIF orientation {number}" for number in ORIENTATIONS} <= kinds
    assert len(kinds) >= 30


def test_every_file_of_the_corpus_is_decoded_from_its_content_alone(files):
    for file in files:
        image = decode(file.content)
        assert (image.shape, image.dtype) == ((32, 32, 3), np.uint8), (file.kind, file.extension)
