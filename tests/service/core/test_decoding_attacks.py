"""Files that are made to be expensive: they are refused or contained, and do not delay the images of other clients."""

import asyncio
import struct
import time
from dataclasses import replace

import numpy as np
import pytest

from cifar_core.pixels import ImageRejected
from service.core import decode_checks
from service.core.decoding import Decoder
from tests.cifar_core.image_corpus import gradient, half_transparent, lossless_jpeg, saved
from tests.service.core import hostile_images as hostile
from tests.service.core.decoders import LIMITS, CpuMeter, resident_mib, running

HONEST = saved(gradient(48, 32))
HONEST_SECONDS = 0.3
MAX_DECODE_SECONDS = 1.0

REFUSED = {
    "JPEG of 2,000 scans": (hostile.progressive_jpeg(2000, 2000), "2000 scans; at most 64"),
    "JPEG of a million comments": (hostile.jpeg_of_many_segments(0xFE, 1_000_000), "more than 1000 segments"),
    "JPEG of many Huffman tables": (hostile.jpeg_of_many_segments(0xC4, 5000, bytes(17)), "more than 1000 segments"),
    "run-length BMP": (hostile.run_length_bmp(32_000_000), "run-length encoded"),
    "PNG of 800,000 chunks": (hostile.png_of_many_chunks(b"teSt", 800_000), "more than 256 chunks of metadata"),
    "PNG of 800,000 empty data chunks": (hostile.png_of_many_chunks(b"IDAT", 800_000), "more than 16384 chunks"),
    "PNG with 200 MiB of inflating text": (hostile.png_with_inflating_text(200), "more than 32 text chunks"),
    "PNG with a profile of 1 GiB": (hostile.png_with_inflating_profile(2**30), "too large"),
    "animated PNG of 100,000 frames": (hostile.apng_of_many_frames(100_000), "more than 16384 chunks"),
    "GIF of a million comments": (hostile.gif_of_many_comments(1_000_000), "more than 4096 blocks"),
    "GIF whose first frame is huge": (hostile.gif_of_large_frame(65_535, 65_535), "at most 32000000 are allowed"),
    "WebP that claims 268 million pixels": (hostile.webp_of_large_canvas(16_383), "at most 32000000 are allowed"),
    "WebP that needs too much memory": (hostile.webp_of_large_canvas(4000), "MiB of memory; at most 224 MiB"),
    "WebP of a million chunks": (hostile.webp_of_many_chunks(1_000_000), "more than 4096 chunks"),
    "PNG of 30 million rows": (hostile.png(1, 30_000_000, 8, 0, bytes(6_000_000)), "at most 65535 per side"),
}
ACCEPTED = {
    "JPEG of 20 scans": hostile.progressive_jpeg(64, 20),
    "JPEG of 900 comments": hostile.jpeg_of_many_segments(0xFE, 900),
    "PNG of 200 chunks": hostile.png_of_many_chunks(b"teSt", 200),
    "PNG with 32 MiB of inflating text": hostile.png_with_inflating_text(32),
    "PNG of 10,000 data chunks": hostile.png_of_many_chunks(b"IDAT", 10_000),
    "animated PNG of 5,000 frames": hostile.apng_of_many_frames(5_000),
    "GIF of 2,000 comments": hostile.gif_of_many_comments(2000),
    "overlapping Exif entries": hostile.jpeg_with_overlapping_exif(),
}
EXPENSIVE = {
    "JPEG of 60 scans": hostile.progressive_jpeg(5600, 60),
    "16-bit PNG": hostile.png_16_bit(5600),
    "interlaced PNG": hostile.png(5600, 5600, 8, 2, bytes(3 * 5600 * 5600 + 20 * 5600), interlace=1),
}


def frame_of(file: bytes) -> slice:
    """Where the frame header (SOF) of a JPEG file is."""
    start = next(at for at in (file.find(b"\xff\xc0"), file.find(b"\xff\xc2")) if at > 0)
    return slice(start, start + 2 + int.from_bytes(file[start + 2 : start + 4], "big"))


def test_scans_are_counted_unless_the_first_one_of_a_jpeg_is_all_that_libjpeg_reads():
    picture = gradient(64, 48).convert("RGB")
    baseline, progressive = saved(picture, "JPEG"), saved(picture, "JPEG", progressive=True)
    scans = progressive.count(b"\xff\xda")
    assert scans > 5
    single = decode_checks.Structure(scans=1, keeps_coefficients=False, is_scalable=True)
    assert decode_checks.check_structure(baseline) == single
    assert decode_checks.check_structure(baseline + baseline) == single  # what follows the picture is not read
    several = decode_checks.Structure(scans, keeps_coefficients=True, is_scalable=True)
    assert decode_checks.check_structure(progressive) == several
    # An interrupted download: libjpeg keeps the coefficients although there is one scan.
    first = progressive[: progressive.index(b"\xff\xda", progressive.index(b"\xff\xda") + 2)]
    assert decode_checks.check_structure(first) == replace(several, scans=1)

    # Whatever is irregular before the first scan, the scans are counted, and nothing is scaled.
    frame, other = frame_of(progressive), baseline[frame_of(baseline)]
    head, tail = progressive[: frame.start], progressive[frame.stop :]
    irregular = replace(several, is_scalable=False)
    for header in (
        other + progressive[frame],
        progressive[frame] + other,
        b"\xff" + other,
        b"\x00" + other,
        b"\xff\x01" + other,
        b"\xff\xc3" + other[2:],
        b"",
    ):
        assert decode_checks.check_structure(head + header + tail) == irregular
    more_components = other[:9] + b"\x04" + other[10:]
    assert decode_checks.check_structure(head + more_components + tail) == several


def test_a_lossless_jpeg_is_decoded_in_full_size_under_the_limits():
    async def test():
        async with running(1) as decoder:
            small, large = await decoder.decode([lossless_jpeg(300, 200), lossless_jpeg(5000, 4000)])
            assert (small == 128).all()
            assert (large == 128).all()

    asyncio.run(test())


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_with_an_expensive_structure_is_refused_before_it_is_decoded(name):
    file, message = REFUSED[name]
    assert len(file) <= 10 * 2**20

    async def test():
        async with running(1) as decoder, CpuMeter(decoder) as meter:
            (result,) = await decoder.decode([file])
            await asyncio.sleep(0.05)
        assert isinstance(result, ImageRejected)
        assert message in str(result)
        assert not result.internal
        assert meter.seconds < 0.8
        assert meter.peak_mib < 100

    asyncio.run(test())


@pytest.mark.parametrize("name", ACCEPTED)
def test_a_file_whose_structure_is_within_the_limits_is_decoded(name):
    async def test():
        async with running(1) as decoder:
            (result,) = await decoder.decode([ACCEPTED[name]])
        assert isinstance(result, np.ndarray), result

    asyncio.run(test())


async def slowest_honest_answer(decoder: Decoder, meter: CpuMeter, attack: "asyncio.Future[object]") -> float:
    """Sends a small image every 20 ms until the attack is over; the longest time that an answer took, in seconds.

    The time for which the processes wait for a CPU is not counted: other programs may keep the machine busy.
    """
    slowest = 0.0
    while not attack.done():
        began = time.perf_counter() - meter.waited
        (result,) = await decoder.decode([HONEST], client="honest")
        slowest = max(slowest, time.perf_counter() - meter.waited - began)
        assert isinstance(result, np.ndarray)
        await asyncio.sleep(0.02)
    return slowest


@pytest.mark.parametrize("name", EXPENSIVE)
def test_honest_images_are_answered_at_once_while_expensive_ones_are_decoded(name):
    async def test():
        async with running(2) as decoder, CpuMeter(decoder) as meter:
            attack = asyncio.gather(*(decoder.decode([EXPENSIVE[name]] * 2, client=f"{i}") for i in range(2)))
            assert await slowest_honest_answer(decoder, meter, attack) < HONEST_SECONDS
            await attack
        assert meter.seconds < 4 * 2 * MAX_DECODE_SECONDS
        assert meter.peak_mib < 400

    asyncio.run(test())


def test_files_whose_cost_cannot_be_predicted_move_to_the_slow_lane():
    """Small in pixels and memory, but slow: more than 0.15 s each."""
    file = hostile.noise_jpeg(800, scans=64)

    async def test():
        ended = []
        async with running(2, max_decode_seconds=0.1, on_ended=ended.append) as decoder:
            async with CpuMeter(decoder) as meter:
                requests = [decoder.decode([file] * 8, client=f"attacker {i % 2}") for i in range(4)]
                attack = asyncio.gather(*requests)
                assert await slowest_honest_answer(decoder, meter, attack) < HONEST_SECONDS
                results = [result for results in await attack for result in results]
            assert all(isinstance(result, ImageRejected) for result in results)
            assert ended.count("limit") >= len(results)
            assert meter.seconds < len(results) * 2 * 0.1 + 1.0

    asyncio.run(test())


def test_memory_of_four_16_bit_images_stays_within_the_limit_and_is_given_back():
    async def test():
        file = hostile.png_16_bit(5600)
        async with running(2) as decoder, CpuMeter(decoder) as meter:
            results = await decoder.decode([file] * 4)
            assert all(isinstance(result, np.ndarray) for result in results)
            assert meter.peak_mib < 300
            assert sum(map(resident_mib, decoder.pids)) < 100

    asyncio.run(test())


def test_a_file_that_needs_more_memory_than_allowed_is_refused_by_its_header():
    demand = decode_checks.Demand(pixels=10**8, memory=500 * 2**20)
    with pytest.raises(ImageRejected, match="needs about 500 MiB of memory; at most 224 MiB are allowed"):
        decode_checks.check_memory(demand, 224 * 2**20)


# The sizes that headers claim. Width and height differ, and neither fits into a byte.

WEBP = {
    "VP8 ": saved(gradient(300, 517), "WEBP"),
    "VP8L": saved(half_transparent(300, 517), "WEBP", lossless=True),  # a bit above the height says that it has alpha
    "VP8X": saved(half_transparent(300, 517), "WEBP"),
}


def size_of(file: bytes) -> tuple[int, int]:
    """Pixels, and bytes of memory without those of the file, by the header alone."""
    demand = decode_checks.demand_by_header(file, LIMITS)
    assert demand is not None
    return demand.pixels, demand.memory - len(file)


def assert_size(file: bytes, width: int, height: int, bytes_per_pixel: int) -> None:
    assert size_of(file) == (width * height, width * height * bytes_per_pixel)
    with pytest.raises(ImageRejected, match=f"the image has {width} x {height} ="):
        decode_checks.demand_by_header(file, replace(LIMITS, max_pixels=width * height - 1))
    decode_checks.demand_by_header(file, replace(LIMITS, max_pixels=width * height))


@pytest.mark.parametrize("kind", WEBP)
def test_the_header_of_every_kind_of_webp_gives_its_size(kind):
    assert WEBP[kind][12:16] == kind.encode()
    assert_size(WEBP[kind], 300, 517, bytes_per_pixel=16)


def test_the_largest_sizes_that_a_webp_header_can_hold_are_read():
    scaled = struct.pack("<HH", 0x4000 | 300, 0x8000 | 517)  # the upper two bits are for scaling by the viewer
    assert_size(WEBP["VP8 "][:26] + scaled + WEBP["VP8 "][30:], 300, 517, bytes_per_pixel=16)
    limits = replace(LIMITS, max_pixels=2**49)
    for kind, start, end, side in (
        ("VP8 ", 26, 30, 2**14 - 1),
        ("VP8L", 21, 25, 2**14),
        ("VP8X", 24, 30, 2**24),
    ):
        file = WEBP[kind][:start] + b"\xff" * (end - start) + WEBP[kind][end:]
        demand = decode_checks.demand_by_header(file, limits)
        assert demand is not None
        assert demand.pixels == side * side


@pytest.mark.parametrize("kind", WEBP)
def test_a_webp_whose_header_is_cut_off_or_unknown_is_left_to_the_decoder(kind):
    file = WEBP[kind]
    assert decode_checks.demand_by_header(file[:30], LIMITS) is not None
    for damaged in (
        file[:29],
        b"",
        b"RIFX" + file[4:],
        file[:8] + b"WAVE" + file[12:],
        file[:12] + b"VP9 " + file[16:],
    ):
        assert decode_checks.demand_by_header(damaged, LIMITS) is None


def gif(canvas: tuple[int, int], frame: tuple[int, int, int, int] | None, before: bytes = b"", flags: int = 0) -> bytes:
    """A canvas, blocks, and the header of a frame: left, top, width and height."""
    head = b"GIF89a" + struct.pack("<HHBBB", *canvas, flags, 0, 0)
    return head + before + (b"" if frame is None else b"," + struct.pack("<HHHHB", *frame, 0))


@pytest.mark.parametrize(
    ("frame", "width", "height"),
    [
        (None, 300, 517),
        ((0, 0, 10, 20), 300, 517),
        ((290, 0, 11, 20), 301, 517),
        ((0, 510, 10, 8), 300, 518),
        ((1000, 2000, 300, 400), 1300, 2400),
    ],
)
def test_the_size_of_a_gif_is_that_of_its_canvas_or_of_a_first_frame_beyond_it(frame, width, height):
    assert_size(gif((300, 517), frame), width, height, bytes_per_pixel=2)
    assert_size(gif((300, 517), frame).replace(b"GIF89a", b"GIF87a"), width, height, bytes_per_pixel=2)


def test_the_first_frame_of_a_gif_is_found_after_its_colours_its_extensions_and_bytes_that_begin_no_block():
    frame = (1000, 2000, 300, 400)
    colours, comment = b"," * 3 * 2**6, b"!\xfe\x03,,,\x02,,\x00"
    for before, flags in (
        (colours, 0x85),
        (b"", 2),
        (comment, 0),
        (b"\0x", 0),
        (colours + comment + b"\0" + comment, 0x85),
    ):
        assert_size(gif((300, 517), frame, before, flags), 1300, 2400, bytes_per_pixel=2)
    assert_size(gif((300, 517), frame, b";"), 300, 517, bytes_per_pixel=2)  # the file ends before the frame


def test_a_gif_that_is_cut_off_has_the_size_of_the_part_that_is_there():
    file = gif((300, 517), (1000, 2000, 300, 400))
    assert_size(file[:22], 1300, 2400, bytes_per_pixel=2)
    for end in (13, 14, 21):
        assert_size(file[:end], 300, 517, bytes_per_pixel=2)
    assert decode_checks.demand_by_header(file[:12], LIMITS) is None


def test_only_webp_and_gif_files_are_measured_by_their_header():
    for format_ in ("PNG", "JPEG", "BMP"):
        assert decode_checks.demand_by_header(saved(gradient(64, 48), format_), LIMITS) is None


@pytest.mark.parametrize(
    ("kind", "most", "message"),
    [
        (b"zTXt", 32, "more than 32 text chunks"),
        (b"iTXt", 32, "more than 32 text chunks"),
        (b"tEXt", 255, "more than 256 chunks of metadata"),  # the header of the file (IHDR) is one of the 256
        (b"IDAT", 16_382, "more than 16384 chunks"),  # besides the header and the pixels
        (b"fcTL", 16_382, "more than 16384 chunks"),
        (b"fdAT", 16_382, "more than 16384 chunks"),
    ],
)
def test_a_png_may_have_chunks_of_each_kind_up_to_the_limit(kind, most, message):
    decode_checks.check_structure(hostile.png_of_many_chunks(kind, most))
    with pytest.raises(ImageRejected, match=message):
        decode_checks.check_structure(hostile.png_of_many_chunks(kind, most + 1))


def test_chunks_of_a_png_count_up_to_its_end_and_damage_is_left_to_the_decoder():
    file = saved(gradient(32, 32))
    texts = hostile.png_chunk(b"iTXt", b"k\0\0\0\0\0") * 100
    decode_checks.check_structure(file + texts)
    end = len(file) - 12
    with pytest.raises(ImageRejected, match="more than 32 text chunks"):
        decode_checks.check_structure(file[:end] + texts + file[end:])
    endless = struct.pack(">I", 2**32 - 1) + b"teSt"
    decode_checks.check_structure(file[:end] + endless + texts)  # a chunk that claims to be longer than the file


def test_a_gif_may_have_4096_blocks_before_its_first_picture():
    extension, comment = b"!\xfe\0", b"!\xfe\x01x\0"  # one block, and one with a part
    for most in (extension * 4096, comment * 2048):
        decode_checks.check_structure(gif((300, 517), (0, 0, 300, 517), most))
        with pytest.raises(ImageRejected, match="more than 4096 blocks"):
            decode_checks.check_structure(gif((300, 517), (0, 0, 300, 517), most + extension))


def test_a_webp_may_have_4096_chunks_each_of_which_ends_at_an_even_place():
    chunk = b"junk" + struct.pack("<I", 1) + b"x\0"
    decode_checks.check_structure(WEBP["VP8X"][:12] + chunk * 4096)
    with pytest.raises(ImageRejected, match="more than 4096 chunks"):
        decode_checks.check_structure(WEBP["VP8X"][:12] + chunk * 4097)
