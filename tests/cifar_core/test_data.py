import hashlib
import os
import pickle
import subprocess
import tarfile

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cifar_core import image_folder as image_folder_room
from cifar_core.data import (
    Batches,
    Images,
    channel_statistics,
    epoch_generator,
    load_dataset,
    split,
    subset_sampler,
    summary,
    weighted_sampler,
)
from cifar_core.image_folder import DataError, decode_image, read_image_folder


def sha256(tensor):
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()


# The split


def test_cifar10_is_split_into_the_same_49000_and_1000_images_on_every_machine():
    training, validation = split(50_000)
    assert (len(training), len(validation)) == (49_000, 1_000)
    assert sha256(validation) == "f97076ea6db59a96dc81a59d1b573bc8aaecdb8efa1e93c0d79928bfbf8a43f8"


@given(count=st.integers(20, 3000), held_out=st.integers(1, 2000), seed=st.integers(0, 2**32 - 1))
def test_every_image_is_either_trained_on_or_held_out(count, held_out, seed):
    training, validation = split(count, held_out, seed)
    assert sorted([*training.tolist(), *validation.tolist()]) == list(range(count))
    assert len(validation) == min(held_out, count // 10)


def test_too_few_images_to_split_are_refused():
    with pytest.raises(DataError, match="at least 20"):
        split(19)


# The loaders


@pytest.mark.parametrize("kind", ["weighted", "subset"])
def test_a_sampler_draws_every_training_image_once_and_no_other(kind):
    training, _ = split(500)
    generator = epoch_generator(seed=3, epoch=0)
    sampler = weighted_sampler(training, 500, generator) if kind == "weighted" else subset_sampler(training, generator)
    order = list(sampler)
    assert sorted(order) == training.tolist()
    assert order != training.tolist()


def test_an_epochs_order_depends_on_seed_and_epoch_alone():
    indices = torch.arange(100)
    torch.manual_seed(1)
    first = list(subset_sampler(indices, epoch_generator(5, 2)))
    torch.manual_seed(2)
    assert list(subset_sampler(indices, epoch_generator(5, 2))) == first
    assert list(subset_sampler(indices, epoch_generator(5, 3))) != first
    assert list(subset_sampler(indices, epoch_generator(6, 2))) != first


@pytest.mark.parametrize("start", [0, 1, 3])
def test_batches_gather_images_and_labels_in_the_order_given(start):
    images = torch.arange(10 * 32 * 32 * 3).reshape(10, 32, 32, 3).to(torch.uint8)
    data = Images(images, torch.arange(10))
    order = torch.tensor([3, 1, 4, 0, 5, 9, 2, 6, 8, 7])
    batches = Batches(data, order, batch_size=3, start=start)
    got = list(batches)
    assert len(got) == len(batches) == 4 - start
    assert torch.cat([labels for _, labels in got]).tolist() == order[3 * start :].tolist()
    for batch, labels in got:
        assert torch.equal(batch, images[labels])


# The statistics


def test_channel_statistics_are_those_of_all_pixels(small):
    means, stds = channel_statistics(small.train.images)
    pixels = small.train.images.numpy().reshape(-1, 3) / 255
    assert means == pytest.approx(pixels.mean(0), abs=1e-12)
    assert stds == pytest.approx(pixels.std(0), abs=1e-12)


def test_the_real_images_have_the_published_statistics(real):
    assert (len(real.train), len(real.test)) == (50_000, 10_000)
    assert real.classes == (
        "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
    )  # fmt: skip
    for part, each in ((real.train, 5_000), (real.test, 1_000)):
        assert torch.bincount(part.labels).tolist() == [each] * 10
    means, stds = channel_statistics(real.train.images)
    # JPEG's losses move the third decimal; the official archive must match to the last digit published.
    exact = real.kind == "cifar10"
    assert means == pytest.approx(
        (0.49139967861519607, 0.48215840839460783, 0.44653091444546567), abs=1e-9 if exact else 5e-4
    )
    assert stds == pytest.approx(
        (0.2470322324632819, 0.24348512800005573, 0.26158784172796434), abs=1e-9 if exact else 3e-3
    )


# The generated set


def test_the_synthetic_set_is_the_same_everywhere_and_of_any_size(small):
    assert small.fingerprint == "1d072b441207f2a56995d2b5e92dc5b7a10ef5f19029f868a583d98e75c0f1b9"
    assert torch.bincount(small.train.labels).tolist() == [30] * 10
    assert len(load_dataset("synthetic:77").train) == 77


@pytest.mark.parametrize("size", ["0", "49", "-5", "many", "1000001"])
def test_a_size_that_makes_no_sense_is_refused(size):
    with pytest.raises(DataError, match="50 to 1,000,000"):
        load_dataset(f"synthetic:{size}")


# Folders of image files


def test_a_folder_holds_the_same_as_the_set_it_was_written_from(small, image_folder):
    read = load_dataset(str(image_folder))
    assert read.kind == "folder"
    assert read.name == "pictures"
    assert read.classes == tuple(sorted(small.classes))
    for part, original in ((read.train, small.train), (read.test, small.test)):
        assert len(part) == len(original)
        for image, label in list(zip(part.images, part.labels, strict=True))[::17]:
            same = [
                small.classes[int(original.labels[row])]
                for row in range(len(original))
                if torch.equal(original.images[row], image)
            ]
            assert same == [read.classes[int(label)]]


def test_the_second_start_decodes_nothing(image_folder, monkeypatch):
    first = load_dataset(str(image_folder))
    monkeypatch.setattr(image_folder_room, "decode_image", lambda path: pytest.fail(f"{path} was decoded again"))
    assert load_dataset(str(image_folder)).fingerprint == first.fingerprint


@pytest.mark.parametrize("change", ["rewrite", "add", "remove", "rename"])
def test_a_folder_that_changed_is_decoded_again(image_folder, change):
    before = load_dataset(str(image_folder)).fingerprint
    file = sorted((image_folder / "train" / "disc").iterdir())[0]
    times = (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    if change == "rewrite":
        content = bytearray(file.read_bytes())
        Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(file)
        file.write_bytes(file.read_bytes().ljust(len(content), b"\0")[: max(len(content), file.stat().st_size)])
        os.utime(file, ns=times)  # even a rewrite that hides behind the old size and time
    elif change == "add":
        Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(file.with_name("zzz.png"))
    elif change == "remove":
        file.unlink()
    else:
        file.rename(image_folder / "train" / "ring" / "moved.png")
    assert load_dataset(str(image_folder)).fingerprint != before


def test_a_damaged_cache_is_made_anew_and_said(image_folder, caplog):
    before = load_dataset(str(image_folder)).fingerprint
    file = image_folder_room._cache_file(image_folder)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.write_bytes(content)
    assert load_dataset(str(image_folder)).fingerprint == before
    assert str(file) in caplog.text
    caplog.clear()
    load_dataset(str(image_folder))
    assert not caplog.text


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "I;16"])
def test_every_kind_of_image_becomes_rgb_of_32_by_32(tmp_path, mode):
    grey = Image.fromarray(np.tile(np.arange(32, dtype=np.uint8) * 8, (32, 1)))
    image = Image.fromarray(np.asarray(grey, np.uint16) * 256) if mode == "I;16" else grey.convert(mode)
    file = tmp_path / ("x.jpg" if mode == "CMYK" else "x.png")
    image.save(file)
    decoded = decode_image(file)
    assert decoded.shape == (32, 32, 3)
    assert decoded.dtype == np.uint8
    # The same picture in every mode; a palette and JPEG's losses move a value a little.
    expected = np.broadcast_to(np.asarray(grey)[..., None], (32, 32, 3))
    assert np.abs(decoded.astype(int) - expected).max() <= 12


def test_another_size_is_cropped_to_its_centre_and_resized(tmp_path):
    wide = np.zeros((64, 192, 3), np.uint8)
    wide[:, 64:128] = 200  # the central square
    Image.fromarray(wide).save(tmp_path / "wide.png")
    decoded = decode_image(tmp_path / "wide.png")
    assert (decoded[:, 2:-2] == 200).all()


def break_missing(folder):
    return folder / "nowhere"


def break_no_test(folder):
    (folder / "test").rename(folder / "elsewhere")


def break_empty_class(folder):
    for file in (folder / "train" / "ring").iterdir():
        file.unlink()


def break_one_class(folder):
    for place in list((folder / "train").iterdir()) + list((folder / "test").iterdir()):
        if place.name != "ring":
            for file in place.iterdir():
                file.unlink()
            place.rmdir()


def break_text(folder):
    next((folder / "train" / "ring").iterdir()).write_text("this is no image")


def break_truncated(folder):
    file = next((folder / "train" / "ring").iterdir())
    file.write_bytes(file.read_bytes()[:200])


def break_link(folder):
    (folder / "train" / "ring" / "link.png").symlink_to(folder / "nowhere.png")


def break_classes(folder):
    (folder / "test" / "ring").rename(folder / "test" / "wheel")


@pytest.mark.parametrize(
    ("breaking", "named"),
    [
        (break_missing, "nowhere"),
        (break_no_test, "no test/"),
        (break_empty_class, "ring"),
        (break_one_class, "one class only"),
        (break_text, "ring"),
        (break_truncated, "ring"),
        (break_link, "link.png"),
        (break_classes, "ring, wheel"),
    ],
)
def test_a_folder_that_cannot_be_read_is_an_error_with_both_ways_out(image_folder, breaking, named):
    folder = breaking(image_folder) or image_folder
    with pytest.raises(DataError) as caught:
        read_image_folder(folder)
    message = str(caught.value)
    assert named in message
    assert str(image_folder) in message
    assert "--data cifar10" in message
    assert "--data synthetic" in message


# The official archive


def write_official(root, monkeypatch, images_per_file=20):
    """An archive of the official form, small, whose md5 sums torchvision is told to expect."""
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
        sums[file.name] = hashlib.md5(file.read_bytes()).hexdigest()  # noqa: S324 (the archive's own)
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
    """Every download ends at a port where nobody listens."""
    for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")


@pytest.mark.parametrize("form", ["unpacked", "archive"])
def test_the_official_archive_is_read_from_a_folder_where_someone_put_it(tmp_path, monkeypatch, form):
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
    # The archive is channels first, memory is channels last.
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


def test_an_archive_that_cannot_be_downloaded_is_an_error_with_both_ways_out(tmp_path, monkeypatch):
    no_network(monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CIFAR10_DATA", raising=False)
    with pytest.raises(DataError) as caught:
        load_dataset()
    for expected in ("data:", "could not be downloaded", "cifar-10-python.tar.gz", "--data FOLDER", "--data synthetic"):
        assert expected in str(caught.value)


# The command


def test_the_command_prints_the_summary_and_writes_figure_1(command, tmp_path, small):
    done: subprocess.CompletedProcess[str] = command(
        "cifar_core.data", "--data", "synthetic:300", "--figure", tmp_path / "f.png"
    )
    assert done.returncode == 0, done.stderr
    assert summary(small) in done.stdout
    assert "0.491400" in done.stdout
    with Image.open(tmp_path / "f.png") as figure:
        assert figure.width > 800
        assert len(figure.convert("RGB").getcolors(10**7)) > 1000  # pictures, not blank axes


def test_an_error_is_one_line_and_exit_code_2(command, tmp_path):
    done = command("cifar_core.data", "--data", tmp_path / "nowhere")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1
