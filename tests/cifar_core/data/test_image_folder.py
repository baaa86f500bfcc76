import hashlib
import io
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cifar_core import images
from cifar_core.data import DataError, load_dataset
from cifar_core.data import image_folder as loader
from cifar_core.data.image_folder import read_image_folder
from cifar_core.data.stratify import stratified_split
from cifar_core.pixels import EXTENSIONS
from tests.conftest import REPOSITORY

GREY_RAMP = Image.fromarray(np.tile(np.arange(32, dtype=np.uint8) * 8, (32, 1)))


def write_classes(folder, files):
    """A folder whose class "a" holds these files in train/ and test/, and whose class "b" holds one grey image."""
    for split in ("train", "test"):
        for name in ("a", "b"):
            (folder / split / name).mkdir(parents=True)
        GREY_RAMP.save(folder / split / "b" / "grey.png")
        for name, content in files.items():
            (folder / split / "a" / name).write_bytes(content)
    return folder


def read(folder):
    """The training set, the test set and the classes."""
    content = read_image_folder(folder)
    return content.train, content.test, content.classes


def encode(image, form, **options):
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def test_a_folder_holds_the_same_images_as_the_data_set_it_was_written_from(small, image_folder):
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


# Decoding


def test_every_supported_extension_is_read_in_lower_and_upper_case(tmp_path):
    forms = dict.fromkeys((".jfif", ".jpe", ".jpeg", ".jpg"), "JPEG") | dict.fromkeys((".apng", ".png"), "PNG")
    forms |= {".webp": "WEBP", ".gif": "GIF", ".bmp": "BMP"}
    assert forms.keys() == set(EXTENSIONS)
    files = {}
    for extension, form in forms.items():
        files["lower" + extension] = files["UPPER" + extension.upper()] = encode(GREY_RAMP.convert("RGB"), form)
    (train, labels), _, classes = read(write_classes(tmp_path, files))
    assert classes == ["a", "b"]
    assert labels.tolist() == [0] * len(files) + [1]
    for name, pixels in zip(sorted(files), train, strict=False):
        np.testing.assert_array_equal(pixels, images.decode(files[name]))


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK", "I;16"])
def test_the_pixels_of_every_kind_of_image_are_those_of_the_servers_decoder(tmp_path, mode):
    if mode == "I;16":
        image = Image.fromarray(np.asarray(GREY_RAMP, np.uint16) * 256)
    elif mode in ("LA", "RGBA"):
        image = GREY_RAMP.convert(mode)
        image.putalpha(GREY_RAMP.rotate(90))
    else:
        image = GREY_RAMP.convert(mode)
    content = encode(image, "JPEG" if mode == "CMYK" else "PNG")
    (train, _), (test, _), _ = read(write_classes(tmp_path, {"x.png": content}))
    np.testing.assert_array_equal(train[0], images.decode(content))
    np.testing.assert_array_equal(test[0], images.decode(content))
    assert train[0].std() > 10  # the ramp is still visible


def test_transparent_pixels_are_white(tmp_path):
    content = encode(Image.new("RGBA", (32, 32), (10, 20, 30, 0)), "PNG")
    (train, _), _, _ = read(write_classes(tmp_path, {"x.png": content}))
    assert (train[0] == 255).all()


def test_an_image_of_another_size_is_cropped_to_its_central_square_and_resized(tmp_path):
    wide = np.zeros((64, 192, 3), np.uint8)
    wide[:, 64:128] = 200  # the central square
    files = {"wide.png": encode(Image.fromarray(wide), "PNG")}
    (train, _), _, _ = read(write_classes(tmp_path, files))
    assert (train[0][:, 2:-2] == 200).all()


def test_files_that_are_no_images_are_left_out_and_reported_with_the_reason(tmp_path, caplog):
    damaged = encode(GREY_RAMP, "PNG")[:60]
    files = {"x.png": encode(GREY_RAMP, "PNG"), "x.tiff": encode(GREY_RAMP, "TIFF"), "y.TIFF": b"", "notes": b"text"}
    folder = write_classes(tmp_path, files | {"cut.png": damaged, "empty.png": b"", ".hidden.png": b""})
    (folder / "train" / "a" / "link.png").symlink_to(folder / "nowhere.png")
    os.mkfifo(folder / "train" / "a" / "pipe.png")
    (folder / "train" / "loose.png").write_bytes(files["x.png"])
    (folder / "README.md").write_text("")
    with caplog.at_level(logging.WARNING):
        dataset = load_dataset(str(folder))
    assert len(dataset.train) == 2
    left_out = {entry.path: entry.reason for entry in read_image_folder(folder).left_out}
    assert {path for path in left_out if path.startswith("train")} == {
        "train/a/x.tiff", "train/a/y.TIFF", "train/a/notes", "train/a/cut.png", "train/a/empty.png", "train/a/link.png",
        "train/a/pipe.png", "train/loose.png",
    }  # fmt: skip
    assert "extension: .tiff; extensions of image files: .apng .bmp" in left_out["train/a/y.TIFF"]
    assert "0 bytes" in left_out["train/a/empty.png"] or "empty" in left_out["train/a/empty.png"]
    assert "a link to a missing file" in left_out["train/a/link.png"]
    assert left_out["README.md"] == "not in a class folder"
    message = caplog.records[0].getMessage()
    assert f"{folder}: {len(left_out)} files or folders were left out" in message
    assert any("4 because of: extension: .tiff" in remark for remark in dataset.remarks)
    caplog.clear()
    load_dataset(str(folder))  # from the cache
    assert caplog.records[0].getMessage() == message


def test_there_is_no_warning_if_no_file_is_left_out(image_folder, caplog):
    load_dataset(str(image_folder))
    assert not caplog.records


# The cache


def refuse_to_decode(monkeypatch):
    def decode(content):
        pytest.fail("a file was decoded again")

    monkeypatch.setattr(loader, "decode", decode)


def test_the_second_start_decodes_nothing(image_folder, monkeypatch):
    first = load_dataset(str(image_folder))
    refuse_to_decode(monkeypatch)
    assert load_dataset(str(image_folder)).fingerprint == first.fingerprint


def test_the_cache_of_another_decoder_is_not_used(image_folder, monkeypatch):
    load_dataset(str(image_folder))
    monkeypatch.setattr(loader, "DECODER_VERSION", images.DECODER_VERSION + 1)
    monkeypatch.setattr(loader, "decode", lambda content: np.full((32, 32, 3), 7, np.uint8))
    assert (load_dataset(str(image_folder)).train.images == 7).all()


@pytest.mark.parametrize("change", ["rewrite", "add", "remove", "rename"])
def test_a_folder_that_changed_is_decoded_again(image_folder, change):
    before = load_dataset(str(image_folder)).fingerprint
    file = sorted((image_folder / "train" / "disc").iterdir())[0]
    times = (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    if change == "rewrite":
        content = bytearray(file.read_bytes())
        Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(file)
        file.write_bytes(file.read_bytes().ljust(len(content), b"\0")[: max(len(content), file.stat().st_size)])
        os.utime(file, ns=times)  # size and modification time are those of the old file
    elif change == "add":
        Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(file.with_name("zzz.png"))
    elif change == "remove":
        file.unlink()
    else:
        file.rename(image_folder / "train" / "ring" / "moved.png")
    assert load_dataset(str(image_folder)).fingerprint != before


def test_a_damaged_cache_is_reported_and_written_again(image_folder, caplog):
    before = load_dataset(str(image_folder)).fingerprint
    (file,) = Path(os.environ["XDG_CACHE_HOME"]).rglob("*.npz")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.write_bytes(content)
    assert load_dataset(str(image_folder)).fingerprint == before
    assert str(file) in caplog.text
    caplog.clear()
    load_dataset(str(image_folder))
    assert not caplog.text


@pytest.mark.parametrize("damage", ["empty", "cut off", "unknown compression", "without an array"])
def test_an_incomplete_cache_is_written_again(tmp_path, monkeypatch, caplog, damage):
    folder = write_classes(tmp_path / "pictures", {"ramp.png": encode(GREY_RAMP, "PNG")})
    before = read_image_folder(folder)
    (file,) = Path(os.environ["XDG_CACHE_HOME"]).rglob("*.npz")
    whole = file.read_bytes()
    if damage == "without an array":
        arrays = dict(np.load(file))
        del arrays["test_labels"]
        np.savez(file, **arrays)
    else:
        entry = whole.index(b"PK\x01\x02")
        unknown = whole[: entry + 10] + b"\x63" + whole[entry + 11 :]
        file.write_bytes({"cut off": whole[: len(whole) // 2], "unknown compression": unknown}.get(damage, b""))
    again = read_image_folder(folder)
    assert f"{file}: this cache cannot be read" in caplog.text
    caplog.clear()
    refuse_to_decode(monkeypatch)
    for content in (again, read_image_folder(folder)):
        assert content.classes == before.classes
        for split, same in ((content.train, before.train), (content.test, before.test)):
            assert all(np.array_equal(array, other) for array, other in zip(split, same, strict=True))
    assert not caplog.text


def test_a_cache_that_could_be_written_only_in_part_is_not_kept(tmp_path, monkeypatch, caplog):
    def write_a_part(stream, **arrays):
        stream.write(b"PK")
        raise OSError(28, "No space left on device")

    folder = write_classes(tmp_path / "pictures", {"ramp.png": encode(GREY_RAMP, "PNG")})
    read_image_folder(folder)
    (file,) = Path(os.environ["XDG_CACHE_HOME"]).rglob("*.npz")
    whole = file.read_bytes()
    GREY_RAMP.save(folder / "train" / "a" / "more.png")
    monkeypatch.setattr(np, "savez", write_a_part)
    assert len(read_image_folder(folder).train[1]) == 3
    assert "could not be cached ([Errno 28] No space left on device)" in caplog.text
    assert file.read_bytes() == whole
    assert list(file.parent.iterdir()) == [file]


def test_an_image_that_was_not_decoded_for_lack_of_memory_is_not_left_out_for_ever(tmp_path):
    large = encode(Image.new("RGB", (9000, 9000)), "PNG", compress_level=1)
    folder = write_classes(tmp_path / "pictures", {"large.png": large})
    program = (
        "import pathlib, resource, sys; from cifar_core.data.image_folder import read_image_folder;"
        "pages = int(pathlib.Path('/proc/self/statm').read_text().split()[0]);"
        "limit = pages * resource.getpagesize() + 150 * 2**20;"
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit));"
        "read_image_folder(pathlib.Path(sys.argv[1]))"
    )
    done = subprocess.run([sys.executable, "-c", program, folder], cwd=REPOSITORY, capture_output=True, text=True)
    assert "large.png: there is not enough memory to decode this image; free some" in done.stderr
    content = read_image_folder(folder)
    assert content.left_out == []
    assert len(content.train[0]) == 2


def test_a_file_that_cannot_be_read_is_tried_again_at_the_next_start(tmp_path):
    folder = write_classes(tmp_path / "pictures", {"good.png": encode(GREY_RAMP, "PNG")})
    (folder / "train/a/memory.png").symlink_to("/proc/self/mem")  # reading its beginning is an I/O error
    content = read_image_folder(folder)
    assert [entry.reason for entry in content.left_out] == ["cannot be read (Input/output error)"]
    assert not list((Path(os.environ["XDG_CACHE_HOME"]) / "cifar-core").glob("*"))


def test_a_cache_that_cannot_be_written_is_reported(image_folder, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(load_dataset(str(image_folder)).train) == 300
    assert "could not be cached" in caplog.text


# Folders without train/ and test/


def write_flat(small, folder, copies=0):
    """The training images as <class>/<name>.png; the first `copies` images of each class occur twice."""
    counts = dict.fromkeys(small.classes, 0)
    for row, (image, label) in enumerate(zip(small.train.images, small.train.labels, strict=True)):
        name = small.classes[int(label)]
        (folder / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.numpy()).save(folder / name / f"{row}.png")
        if counts[name] < copies:
            Image.fromarray(image.numpy()).save(folder / name / f"again-{row}.bmp")
        counts[name] += 1
    return folder


def pixels_of(images):
    return [image.tobytes() for image in images]


def test_a_fifth_of_each_class_becomes_the_test_set_and_copies_are_on_one_side(small, tmp_path):
    content = read_image_folder(write_flat(small, tmp_path / "flat", copies=6))
    (train, train_labels), (test, test_labels) = content.train, content.test
    assert len(train) + len(test) == 300 + 60
    assert not set(pixels_of(train)) & set(pixels_of(test))
    for label in range(10):
        share = (test_labels == label).sum() / ((test_labels == label).sum() + (train_labels == label).sum())
        assert share == pytest.approx(0.2, abs=0.04)
    assert any("60 images are copies of others" in note for note in content.notes)


def test_the_split_depends_on_the_content_alone(small, tmp_path):
    first = read_image_folder(write_flat(small, tmp_path / "first"))
    second = write_flat(small, tmp_path / "second")
    for number, file in enumerate(sorted(second.rglob("*.png"), reverse=True)):
        file.rename(file.with_name(f"renamed-{number:04d}.png"))
    assert sorted(pixels_of(read_image_folder(second).test[0])) == sorted(pixels_of(first.test[0]))


def test_an_image_in_two_classes_is_on_one_side_and_reported(small, tmp_path):
    folder = write_flat(small, tmp_path / "flat")
    for file in sorted((folder / "ring").iterdir())[:20]:
        (folder / "disc" / f"ring-{file.name}").write_bytes(file.read_bytes())
    content = read_image_folder(folder)
    assert not set(pixels_of(content.train[0])) & set(pixels_of(content.test[0]))
    assert any("20 images are in more than one class" in note for note in content.notes)


def test_a_class_of_one_image_or_of_copies_of_one_cannot_be_split(small, tmp_path):
    folder = write_flat(small, tmp_path / "flat")
    files = sorted((folder / "ring").iterdir())
    for file in files[1:]:
        file.write_bytes(files[0].read_bytes())
    with pytest.raises(DataError, match="the class ring has no image for the test set"):
        read_image_folder(folder)


def test_a_class_named_train_is_a_class_and_not_a_set(small, tmp_path):
    folder = write_flat(small, tmp_path / "flat")
    (folder / "ring").rename(folder / "train")
    (folder / "disc").rename(folder / "test")
    assert {"train", "test"} < set(read_image_folder(folder).classes)


# Folders that cannot be read


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


def break_all_files(folder):
    for file in (folder / "train" / "ring").iterdir():
        file.write_bytes(file.read_bytes()[:200])


def break_classes(folder):
    (folder / "test" / "ring").rename(folder / "test" / "wheel")


@pytest.mark.parametrize(
    ("breaking", "named"),
    [
        (break_missing, "nowhere"),
        (break_no_test, "there is train/, but no test/"),
        (break_empty_class, "ring"),
        (break_one_class, "only one class"),
        (break_all_files, "ring: this class has no readable image"),
        (break_classes, "ring, wheel"),
    ],
)
def test_the_error_for_an_unreadable_folder_names_the_file_and_the_alternatives(image_folder, breaking, named):
    folder = breaking(image_folder) or image_folder
    with pytest.raises(DataError) as caught:
        read(folder)
    message = str(caught.value)
    assert named in message
    assert str(image_folder) in message
    assert "--data cifar10" in message
    assert "--data synthetic" in message


def test_links_to_a_folder_that_contains_them_are_not_followed(tmp_path):
    write_classes(tmp_path / "f", {"ramp.png": encode(GREY_RAMP, "PNG")})
    train = tmp_path / "f/train"
    (train / "a/below").mkdir()
    for link, target in (("self", "."), ("again", "."), ("class", ".."), ("all", "../.."), ("below/up", "..")):
        (train / "a" / link).symlink_to(target)
    (train / "a/elsewhere").symlink_to("../b")  # any other link is followed
    for part in ("train", "test"):
        (tmp_path / "f" / part / "all").symlink_to(".")
    content = read_image_folder(tmp_path / "f")
    assert content.train[1].tolist() == [0, 0, 1]
    assert [(entry.path, entry.reason) for entry in content.left_out] == [
        ("test/all", "not in a class folder"),
        *(
            (f"train/a/{link}", "a link to a folder that contains it")
            for link in ("again", "all", "below/up", "class", "self")
        ),
        ("train/all", "not in a class folder"),
    ]


def test_a_folder_whose_name_is_not_utf8_is_read(tmp_path):
    folder = write_classes(tmp_path / os.fsdecode(b"f\xff"), {"ramp.png": encode(GREY_RAMP, "PNG")})
    assert load_dataset(str(folder)).name == r"f\xff"


def test_a_user_without_a_home_folder_is_told_that_nothing_is_cached(tmp_path, monkeypatch, caplog):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    folder = write_classes(tmp_path / "f", {"ramp.png": encode(GREY_RAMP, "PNG")})
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    assert len(read_image_folder(folder).train[1]) == 2
    assert "this user has no home folder" in caplog.text


def by_digest(count):
    """Different images, in the order of the SHA-256 of their pixels."""
    images = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), np.uint8)
    return np.stack(sorted(images, key=lambda image: hashlib.sha256(image.tobytes()).hexdigest()))


def test_test_images_that_a_class_shares_with_an_earlier_one_count_in_its_fifth():
    images = by_digest(180)
    shared = images[:20]  # the test images of the first class
    both = np.concatenate([images[:100], shared, images[100:]])
    split = stratified_split(both, np.repeat([0, 1], 100), ["a", "b"], "data")
    assert np.bincount(split.test[1]).tolist() == [20, 20]


def test_of_images_with_many_copies_the_one_with_the_fewest_is_the_test_set():
    first, second, *others = by_digest(12)
    images = np.stack([*[first] * 5, *[second] * 4, *others])
    split = stratified_split(images, np.repeat([0, 1], [9, 10]), ["a", "b"], "data")
    of_first_class = split.test[0][split.test[1] == 0]
    assert len(of_first_class) == 4
    assert (of_first_class == second).all()


def test_hidden_folders_are_no_classes(small, tmp_path):
    folder = write_flat(small, tmp_path / "flat")
    classes = read_image_folder(folder).classes
    (folder / ".thumbnails").mkdir()
    shutil.copy(next((folder / "ring").iterdir()), folder / ".thumbnails" / "a.png")
    content = read_image_folder(folder)
    assert (content.classes, content.left_out) == (classes, [])
