import hashlib
import os
import pickle
import tarfile

import numpy as np
import pytest
import torch

from cifar_core.data import DataError, load_dataset

# Generated images


def test_the_synthetic_set_is_the_same_on_every_machine_and_has_the_requested_size(small):
    assert small.fingerprint == "1d072b441207f2a56995d2b5e92dc5b7a10ef5f19029f868a583d98e75c0f1b9"
    assert torch.bincount(small.train.labels).tolist() == [30] * 10
    assert len(load_dataset("synthetic:77").train) == 77


@pytest.mark.parametrize("size", ["0", "49", "-5", "many", "1000001", "9" * 5000])
def test_an_impossible_number_of_synthetic_images_is_refused(size):
    with pytest.raises(DataError, match="50 to 1,000,000"):
        load_dataset(f"synthetic:{size}")


# The official archive


def write_official(root, monkeypatch, images_per_file=20):
    """Writes a small archive in the official form, and makes torchvision expect its MD5 sums."""
    from torchvision.datasets import CIFAR10

    rng = np.random.RandomState(0)
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    sums = {}
    for name in [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]:
        content = {
            "data": rng.randint(0, 256, (images_per_file, 3072)).astype(np.uint8),
            "labels": [row % 10 for row in range(images_per_file)],
        }
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    for file in folder.iterdir():
        sums[file.name] = hashlib.md5(file.read_bytes()).hexdigest()  # noqa: S324 (as in the official archive)
    with tarfile.open(root / "cifar-10-python.tar.gz", "w:gz") as archive:
        archive.add(folder, folder.name)
    monkeypatch.setattr(CIFAR10, "train_list", [[f"data_batch_{n}", sums[f"data_batch_{n}"]] for n in range(1, 6)])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(
        CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": sums["batches.meta"]}
    )
    archive_sum = hashlib.md5((root / "cifar-10-python.tar.gz").read_bytes()).hexdigest()  # noqa: S324
    monkeypatch.setattr(CIFAR10, "tgz_md5", archive_sum)
    return folder


def no_network(monkeypatch):
    """Sends every download to a port where nothing listens."""
    for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")


@pytest.mark.parametrize("form", ["unpacked", "archive"])
def test_the_official_archive_is_read_from_a_folder_that_a_user_put_it_in(tmp_path, monkeypatch, form):
    no_network(monkeypatch)
    folder = write_official(tmp_path / "official", monkeypatch)
    first = pickle.loads((folder / "data_batch_1").read_bytes())["data"][0]  # noqa: S301 (written above)
    if form == "archive":
        folder.rename(tmp_path / "away")
    else:
        (tmp_path / "official" / "cifar-10-python.tar.gz").unlink()
    dataset = load_dataset(str(tmp_path / "official"))
    assert dataset.kind == "cifar10"
    assert (len(dataset.train), len(dataset.test)) == (100, 20)
    # The archive stores images channels first.
    assert torch.equal(dataset.train.images[0], torch.from_numpy(first.reshape(3, 32, 32).transpose(1, 2, 0).copy()))


def test_a_corrupt_batch_of_the_official_archive_is_refused_before_it_is_opened(tmp_path, monkeypatch):
    no_network(monkeypatch)
    folder = write_official(tmp_path / "official", monkeypatch)

    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "opened"),))

    (folder / "data_batch_3").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(DataError, match="incomplete or corrupt") as caught:
        load_dataset(str(tmp_path / "official"))
    assert str(tmp_path / "official") in str(caught.value)
    assert not (tmp_path / "opened").exists()


def test_the_error_for_a_failed_download_names_the_alternatives(tmp_path, monkeypatch):
    no_network(monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CIFAR10_DATA", raising=False)
    with pytest.raises(DataError) as caught:
        load_dataset()
    for expected in ("data:", "could not be downloaded", "cifar-10-python.tar.gz", "--data FOLDER", "--data synthetic"):
        assert expected in str(caught.value)


def test_an_archive_of_the_user_that_is_not_the_official_one_is_refused_and_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "torchvision.datasets.cifar.download_and_extract_archive", lambda *_, **__: pytest.fail("tried")
    )
    archive = tmp_path / "cifar-10-python.tar.gz"
    archive.write_bytes(bytes(1000))
    with pytest.raises(DataError, match="this is not the official archive, or a damaged one"):
        load_dataset(str(tmp_path))
    assert archive.read_bytes() == bytes(1000)


def test_data_that_is_empty_is_not_the_default():
    with pytest.raises(DataError, match="--data is empty"):
        load_dataset("")
