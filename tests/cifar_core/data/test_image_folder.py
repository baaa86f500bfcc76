import io
import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cifar_core import images
from cifar_core.data import DataError, load_dataset
from cifar_core.data import image_folder as loader
from cifar_core.data.image_folder import read_image_folder

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
    forms = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".gif": "GIF", ".bmp": "BMP"}
    assert forms.keys() == set(images.EXTENSIONS)
    files = {}
    for extension, form in forms.items():
        files["lower" + extension] = files["UPPER" + extension.upper()] = encode(GREY_RAMP.convert("RGB"), form)
    (train, labels), _, classes = read_image_folder(write_classes(tmp_path, files))
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
    (train, _), (test, _), _ = read_image_folder(write_classes(tmp_path, {"x.png": content}))
    np.testing.assert_array_equal(train[0], images.decode(content))
    np.testing.assert_array_equal(test[0], images.decode(content))
    assert train[0].std() > 10  # the ramp is still visible


def test_transparent_pixels_are_white(tmp_path):
    content = encode(Image.new("RGBA", (32, 32), (10, 20, 30, 0)), "PNG")
    (train, _), _, _ = read_image_folder(write_classes(tmp_path, {"x.png": content}))
    assert (train[0] == 255).all()


def test_an_image_of_another_size_is_cropped_to_its_central_square_and_resized(tmp_path):
    wide = np.zeros((64, 192, 3), np.uint8)
    wide[:, 64:128] = 200  # the central square
    files = {"wide.png": encode(Image.fromarray(wide), "PNG")}
    (train, _), _, _ = read_image_folder(write_classes(tmp_path, files))
    assert (train[0][:, 2:-2] == 200).all()


def test_files_with_other_extensions_are_left_out_and_counted_in_a_warning(tmp_path, caplog):
    files = {"x.png": encode(GREY_RAMP, "PNG"), "x.tiff": encode(GREY_RAMP, "TIFF"), "y.TIFF": b"", "notes": b"text"}
    folder = write_classes(tmp_path, files)
    with caplog.at_level(logging.WARNING):
        (train, _), _, _ = read_image_folder(folder)
    assert len(train) == 2
    (record,) = caplog.records
    message = record.getMessage()
    assert str(folder) in message
    assert "6 files were left out because of their extension (.tiff: 4, without extension: 2)" in message
    assert ".png .jpg .jpeg .webp .gif .bmp" in message


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


def test_a_cache_that_cannot_be_written_is_reported(image_folder, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(load_dataset(str(image_folder)).train) == 300
    assert "could not be cached" in caplog.text


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


def break_text(folder):
    next((folder / "train" / "ring").iterdir()).write_text("this is no image")


def break_empty_file(folder):
    next((folder / "train" / "ring").iterdir()).write_bytes(b"")


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
        (break_one_class, "only one class"),
        (break_text, "ring"),
        (break_empty_file, "0 bytes"),
        (break_truncated, "ring"),
        (break_link, "link.png"),
        (break_classes, "ring, wheel"),
    ],
)
def test_the_error_for_an_unreadable_folder_names_the_file_and_the_alternatives(image_folder, breaking, named):
    folder = breaking(image_folder) or image_folder
    with pytest.raises(DataError) as caught:
        read_image_folder(folder)
    message = str(caught.value)
    assert named in message
    assert str(image_folder) in message
    assert "--data cifar10" in message
    assert "--data synthetic" in message
