"""What the decoder makes of image files: formats, modes, orientation, limits, damage."""

import io
import struct
import time
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps, JpegImagePlugin

from cifar_core.images import FORMATS, decode
from cifar_core.jpeg import read_jpeg_header
from cifar_core.pixels import ImageLimits, ImageRejected, packed_images, raw_image
from tests.cifar_core.image_corpus import gradient, half_transparent, lossless_jpeg, saved, sixteen_bit
from tests.service.exports import pictures

LIMITS = ImageLimits(max_bytes=2**20, max_pixels=1_000_000)


def close(image: np.ndarray, other: Image.Image, tolerance: float) -> bool:
    return bool(np.abs(image.astype(int) - np.asarray(other.convert("RGB")).astype(int)).mean() <= tolerance)


@pytest.mark.parametrize("format_", ["PNG", "BMP"])
def test_an_image_of_the_right_size_keeps_its_pixels_to_the_last_bit(format_):
    pixels = pictures(1)[0]
    assert (decode(saved(Image.fromarray(pixels), format_), LIMITS) == pixels).all()


def test_a_jpeg_of_the_right_size_is_what_training_sees():
    file = saved(Image.fromarray(pictures(1)[0]), "JPEG", quality=80)
    assert (decode(file, LIMITS) == np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))).all()


@pytest.mark.parametrize("format_", FORMATS)
def test_every_format_is_read_cropped_to_its_middle_and_resized(format_):
    wide = gradient(200, 100)
    image = decode(saved(wide, format_), LIMITS)
    assert image.shape == (32, 32, 3)
    assert image.dtype == np.uint8
    middle = wide.crop((50, 0, 150, 100)).resize((32, 32), Image.Resampling.BICUBIC)
    assert close(image, middle, 6.0 if format_ == "GIF" else 2.0)  # GIF has 256 colours


@pytest.mark.parametrize("size", [(1, 1), (3, 50), (31, 33), (640, 481)])
def test_an_image_of_any_size_becomes_32_by_32(size):
    assert decode(saved(gradient(*size)), LIMITS).shape == (32, 32, 3)


def test_resizing_averages_instead_of_taking_single_pixels():
    board = np.zeros((640, 640, 3), np.uint8)
    board[::2] = 255  # every other row: taking nearest pixels would give black or white
    image = decode(saved(Image.fromarray(board)), LIMITS)
    assert abs(image.astype(int) - 127).max() < 20


def exact_square(file: bytes) -> np.ndarray:
    """The central square of a JPEG file, decoded in full size and resized, int [32, 32, 3]."""
    image = Image.open(io.BytesIO(file)).convert("RGB")
    (width, height), side = image.size, min(image.size)
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side)
    return np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC, box=box)).astype(int)


def squares(width: int, height: int) -> Image.Image:
    image = Image.new("RGB", (width, height), "white")
    for left, top in ((0, 0), (width * 3 // 5, height * 3 // 5)):
        image.paste((200, 30, 60), (left, top, left + width // 5, top + height // 5))
    return image


@pytest.mark.parametrize("size", [(261, 261), (289, 289), (513, 513), (569, 569), (625, 625), (333, 777)])
def test_a_jpeg_that_is_decoded_at_a_reduced_size_keeps_every_edge_where_it_is(size):
    file = saved(squares(*size), "JPEG", quality=95)
    # With the incomplete block at its edge taken for a whole one, the picture is shifted, and differs by 50 to 78.
    assert np.abs(decode(file) - exact_square(file)).max() <= 30


def test_a_jpeg_is_decoded_at_a_reduced_size_of_at_least_64_pixels(monkeypatch):
    reduced = []
    draft = JpegImagePlugin.JpegImageFile.draft

    def record(image, mode, size):
        box = draft(image, mode, size)
        reduced.append(image.size)
        return box

    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "draft", record)
    for side in (127, 128, 255, 256, 500, 512, 3000):
        decode(saved(gradient(side, side), "JPEG"))
    assert [size[0] for size in reduced] == [127, 64, 128, 64, 125, 64, 375]  # at least 64


@pytest.mark.parametrize("size", [(40, 40), (64, 64), (150, 100), (2000, 300)])
def test_a_lossless_jpeg_is_decoded_in_full_size(size, monkeypatch):
    """libjpeg does not scale it, and Pillow before version 13 would have allocated memory for the scaled size only."""
    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "draft", lambda *_: pytest.fail("it was to be scaled"))
    file = lossless_jpeg(*size)
    assert not read_jpeg_header(file).is_scalable
    assert (decode(file) == 128).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_orientation_is_applied(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = saved(gradient(96, 64), "JPEG", quality=95, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(file)))
    assert close(decode(file, LIMITS), Image.fromarray(decode(saved(upright), LIMITS)), 2.0)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")  # pytest shows this warning, the server does not
def test_an_image_with_damaged_exif_data_is_still_decoded():
    image = Image.fromarray(pictures(1)[0])
    file = saved(image, "PNG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff garbage")
    assert (decode(file, LIMITS) == np.asarray(image)).all()


def half_red() -> Image.Image:
    image = Image.new("RGBA", (64, 64), (200, 0, 0, 255))
    image.paste((0, 0, 0, 0), (32, 0, 64, 64))
    return image


MODES = {
    "grey": (gradient(64, 64).convert("L"), gradient(64, 64).convert("L")),
    "one bit": (Image.new("1", (64, 64), 1), Image.new("L", (64, 64), 255)),
    "palette": (gradient(64, 64).quantize(256), gradient(64, 64)),
    "grey with alpha": (Image.new("LA", (64, 64), (0, 0)), Image.new("RGB", (64, 64), "white")),
    "alpha": (half_red(), None),
    "opaque alpha": (gradient(64, 64).convert("RGBA"), gradient(64, 64)),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_rgb(mode):
    image, same = MODES[mode]
    pixels = decode(saved(image), LIMITS)
    if same is None:  # the transparent half is white, whatever its colour is
        assert pixels[16, 4].tolist() == [200, 0, 0]
        assert pixels[16, 28].tolist() == [255, 255, 255]
    else:
        assert close(pixels, same.resize((32, 32), Image.Resampling.BICUBIC), 4.0)


def test_a_transparent_colour_of_a_palette_is_white():
    image = Image.new("P", (32, 32), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    assert (decode(saved(image, transparency=1), LIMITS) == 255).all()
    assert decode(saved(image), LIMITS)[0, 0].tolist() == [10, 20, 30]


def test_16_bit_grey_is_reduced_to_its_high_byte():
    ramp = np.linspace(0, 65535, 32 * 32).astype(np.uint16).reshape(32, 32)
    image = decode(saved(Image.fromarray(ramp)), LIMITS)
    assert (image == (ramp >> 8)[..., None]).all()


def test_cmyk_is_converted():
    image = decode(saved(gradient(64, 64).convert("CMYK"), "JPEG", quality=95), LIMITS)
    assert close(image, gradient(64, 64).resize((32, 32), Image.Resampling.BICUBIC), 6.0)


def test_only_the_first_frame_of_an_animation_is_decoded():
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "blue")]
    for format_ in ("GIF", "WEBP"):
        file = saved(frames[0], format_, save_all=True, append_images=frames[1:], lossless=True)
        assert close(decode(file, LIMITS), Image.new("RGB", (32, 32), "red"), 3.0)


def png_of_few_bytes(width: int, height: int) -> bytes:
    """A PNG that claims a size that its data does not have."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("file", [png_of_few_bytes(30_000, 30_000), saved(Image.new("L", (16_000, 16_000)), "WEBP")])
def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(file):
    assert len(file) < 2**20
    began = time.process_time()
    with pytest.raises(ImageRejected, match=r"pixels; at most 1000000 are allowed"):
        decode(file, LIMITS)
    assert time.process_time() - began < 0.5  # CPU time; decoding takes many times as long


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (b"", "empty"),
        (bytes(2**20 + 1), "1048577 bytes; at most 1048576 are allowed"),
        (b"hello, world", "not an image in PNG, JPEG, WEBP, GIF, BMP, .*: it begins with b'hello, w'"),
        (saved(gradient(64, 64), "TIFF"), "not an image"),
        (saved(gradient(64, 64), "PPM"), "not an image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
        (saved(gradient(64, 64))[:-30], "damaged"),
        (saved(gradient(64, 64), "JPEG")[:400], "damaged"),
        (saved(gradient(64, 64), "GIF")[:300], "its header is damaged"),
        (saved(gradient(64, 64), "GIF")[:900], "damaged"),
        (saved(gradient(64, 64), "WEBP")[:100], "damaged|not an image"),
        (saved(gradient(64, 64), "BMP")[:100], "damaged"),
        (png_of_few_bytes(300, 300), "damaged"),
    ],
)
def test_the_error_says_why_an_image_cannot_be_read(file, message):
    with pytest.raises(ImageRejected, match=message) as caught:
        decode(file, LIMITS)
    assert "\n" not in str(caught.value)
    assert not caught.value.internal


SEEDS = [saved(gradient(40, 30), format_) for format_ in FORMATS]


@given(
    st.sampled_from(SEEDS),
    st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=8),
    st.integers(0, 60),
)
def test_a_damaged_file_gives_an_image_or_an_image_rejected_error(seed, changes, cut):
    file = bytearray(seed)
    for place, value in changes:
        file[place % len(file)] = value
    try:
        image = decode(bytes(file[: len(file) - cut]), LIMITS)
    except ImageRejected:
        return
    assert image.shape == (32, 32, 3)
    assert image.dtype == np.uint8


def test_raw_pixels_are_not_changed():
    pixels = pictures(3)
    assert (raw_image(pixels[0].tobytes()) == pixels[0]).all()
    assert (packed_images(pixels.tobytes()) == pixels).all()
    assert packed_images(b"").shape == (0, 32, 32, 3)


def test_raw_pixels_of_another_length_are_refused():
    with pytest.raises(ImageRejected, match="rgb holds 3071 bytes; it must hold 3072"):
        raw_image(bytes(3071))
    with pytest.raises(ImageRejected, match="packed_rgb holds 3073 bytes; it must hold a multiple of 3072"):
        packed_images(bytes(3073))


def test_large_images_are_reduced_in_strips_that_give_the_same_pixels_as_one_piece(monkeypatch):
    large = half_transparent(1600, 1201)
    for image in (large, large.convert("RGB"), large.convert("L"), large.convert("RGB").quantize(64)):
        in_strips = decode(saved(image, compress_level=1))
        monkeypatch.setattr("cifar_core.images._STRIP_PIXELS", 10**9)
        assert (decode(saved(image, compress_level=1)) == in_strips).all()
        monkeypatch.undo()


def test_a_transparent_value_of_16_bit_grey_is_white():
    file = sixteen_bit(2, 2, 1)
    transparent = b"tRNS" + struct.pack(">H", 0)  # the first of the four values
    chunk = struct.pack(">I", 2) + transparent + struct.pack(">I", zlib.crc32(transparent))
    end = file.index(b"IDAT") - 4
    pixels = decode(file[:end] + chunk + file[end:])
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert decode(file)[0, 0].tolist() == [0, 0, 0]


def png(depth: int, colour_type: int, row: bytes, transparent: bytes) -> bytes:
    """A PNG file of 32 equal rows of 32 pixels with a transparent colour."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 32, 32, depth, colour_type, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress((b"\0" + row) * 32))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"tRNS", transparent) + pixels + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("depth", "colour_type", "pixel", "opaque"),
    [
        (1, 0, "00" * 4, b"\0\1"),
        (2, 0, "55" * 8, b"\0\2"),
        (4, 0, "33" * 16, b"\0\4"),
        (8, 0, "33" * 32, b"\0\x34"),
        (8, 2, "010203" * 32, b"\0\1\0\2\0\4"),
        (16, 2, "01ff02ff03ff" * 32, b"\1\xff\2\xff\4\xff"),
    ],
)
def test_the_transparent_colour_of_a_png_of_any_depth_is_white(depth, colour_type, pixel, opaque):
    row = bytes.fromhex(pixel)
    transparent = {1: b"\0\0", 2: b"\0\1", 4: b"\0\3", 8: b"\0\x33"}.get(depth, row[:6])
    if (depth, colour_type) == (8, 2):
        transparent = b"\0\1\0\2\0\3"
    assert (decode(png(depth, colour_type, row, transparent)) == 255).all()
    assert (decode(png(depth, colour_type, row, opaque)) < 255).all()


def test_of_a_jpeg_of_several_pictures_the_first_is_decoded():
    first, second = gradient(300, 200), gradient(300, 200).rotate(180)
    file = saved(first, "MPO", save_all=True, append_images=[second], quality=90)
    assert (decode(file) == decode(saved(first, "JPEG", quality=90))).all()
