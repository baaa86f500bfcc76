"""The pure logic of packing: which images go into which request, and which results belong to which call."""

import io
import os

import grpc
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PillowImage
from PIL import ImageOps

from cifar_core.images import decode, pixels_of
from service.client.answers import ClassificationError, Results, classifications, probability_table
from service.client.contents import Capacity, Content, contents
from service.client.packing import (
    SMALL_IMAGES,
    Entry,
    SharedRequests,
    distribute,
    is_small,
    request_of,
)
from service.client.retrying import Deadline, RequestFailed
from service.generated.cifar.v1 import image_classifier_pb2 as messages
from tests.service.client.scripted import (
    CLASSES,
    IMAGE_BYTES,
    NAMES,
    answer,
    contents_of,
    ranked_answer,
    row_in,
    row_of,
)
from tests.service.exports import pictures

numbers = st.integers(0, 2**31)


def pixels(*seeds: int) -> bytes:
    return b"".join(np.random.default_rng(seed).bytes(IMAGE_BYTES) for seed in seeds)


def images_of(content: Content) -> list[bytes]:
    """The bytes of each image, in order."""
    packed = content.pixels
    return [image.encoded or image.rgb for image in content.images] + [
        packed[start : start + IMAGE_BYTES] for start in range(0, len(packed), IMAGE_BYTES)
    ]


@st.composite
def some_contents(draw: st.DrawFn) -> Content:
    seeds = draw(st.lists(numbers, min_size=1, max_size=5))
    if draw(st.booleans()):
        return Content(pixels=pixels(*seeds))
    images = [
        messages.Image(rgb=pixels(seed)) if draw(st.booleans()) else messages.Image(encoded=b"file %d" % seed)
        for seed in seeds
    ]
    return Content(images=tuple(images))


groups = st.lists(some_contents(), min_size=1, max_size=8)


@given(groups, st.sampled_from([answer, ranked_answer]))
def test_each_call_gets_the_results_of_its_own_images(group, server):
    parts = distribute(group, server(request_of(group)))
    for content, part in zip(group, parts, strict=True):
        assert [row_in(one) for one in classifications(part, 0)] == [row_of(image) for image in images_of(content)]
        assert probability_table([part]).tolist() == [list(row_of(image)) for image in images_of(content)]


@given(groups, st.sets(st.integers(0, 39)), st.booleans())
def test_each_image_that_cannot_be_classified_has_its_own_error(group, bad, knows_tables):
    request = request_of(group)
    response = answer(request) if knows_tables else ranked_answer(request)
    count = len(contents_of(request))
    for index in bad & set(range(count)):
        error = messages.ImageError(code=3, message=f"image {index} is bad")
        if knows_tables:
            response.table.errors[index].CopyFrom(error)
        else:
            response.results[index].CopyFrom(messages.ImageResult(error=error))
    # In the order of the request: all `images` of all contents, then all raw pixels.
    expected = iter(range(count))
    numbers = {id(one): [next(expected) for _ in one.images] for one in group if one.images}
    numbers |= {id(one): [next(expected) for _ in range(one.count)] for one in group if one.pixels}
    for content, part in zip(group, distribute(group, response), strict=True):
        found = [one.error for one in classifications(part, 1)]
        wanted = [f"image {index} is bad" if index in bad else None for index in numbers[id(content)]]
        assert found == wanted
        if any(wanted):
            with pytest.raises(ClassificationError, match="is bad"):
                probability_table([part])


@given(st.integers(0, 2 * CLASSES), st.lists(st.sampled_from([0.0, 0.1, 0.2]), min_size=CLASSES, max_size=CLASSES))
def test_classes_are_ranked_by_probability_and_then_by_index(top_k, row):
    (one,) = classifications(Results(np.array([row], np.float32), NAMES, {}, "1"), top_k)
    order = sorted(range(CLASSES), key=lambda index: (-row[index], index))[: top_k or None]
    assert [(ranked.index, ranked.name) for ranked in one.classes] == [(index, NAMES[index]) for index in order]


def test_a_response_with_another_number_of_results_is_refused():
    content = Content(pixels=pixels(1, 2))
    response = answer(request_of([content]))
    response.table.probabilities = response.table.probabilities[:-4]
    with pytest.raises(
        RequestFailed, match="INTERNAL: the server sent a table of 76 bytes for 2 images and 10 classes"
    ):
        distribute([content], response)
    response = ranked_answer(request_of([content]))
    del response.results[1]
    with pytest.raises(RequestFailed, match="INTERNAL: the server sent 1 results for 2 images"):
        distribute([content], response)
    response = ranked_answer(request_of([content, content]))
    for result in response.results:
        del result.classes[3]
    with pytest.raises(RequestFailed, match="INTERNAL: the server's results lack classes"):
        distribute([content, content], response)


def test_a_response_without_classes_or_with_errors_of_other_images_is_refused():
    content = Content(pixels=pixels(1, 2))
    error = messages.ImageError(code=3, message="bad")
    empty = messages.ProbabilityTable(errors={0: error})
    for response in (
        messages.ClassifyResponse(table=empty),
        messages.ClassifyResponse(results=[messages.ImageResult(), messages.ImageResult(error=error)]),
    ):
        with pytest.raises(RequestFailed, match="INTERNAL: the server sent neither classes nor errors for some of 2"):
            distribute([content], response)
    response = answer(request_of([content]))
    response.table.errors[2].CopyFrom(error)
    with pytest.raises(RequestFailed, match="INTERNAL: the server sent an error for image 2, but there are only 2"):
        distribute([content], response)


@pytest.mark.parametrize(
    ("number", "code"),
    [(3, grpc.StatusCode.INVALID_ARGUMENT), (13, grpc.StatusCode.INTERNAL), (99, grpc.StatusCode.UNKNOWN)],
)
def test_a_table_of_probabilities_fails_with_the_code_of_the_image_that_has_none(number, code):
    error = messages.ImageError(code=number, message="bad")
    for response in (
        messages.ClassifyResponse(table=messages.ProbabilityTable(errors={0: error})),
        messages.ClassifyResponse(results=[messages.ImageResult(error=error)]),
    ):
        with pytest.raises(ClassificationError, match=f"{code.name}: the image with index 0: bad") as caught:
            probability_table([Results.of(response, 1)])
        assert caught.value.code is code


def test_a_table_of_two_models_with_different_classes_is_refused():
    one = Results(np.zeros((1, 2), np.float32), ("cat", "dog"), {}, "1")
    two = Results(np.zeros((1, 2), np.float32), ("cat", "ship"), {}, "2")
    assert probability_table([one, one]).shape == (2, 2)
    with pytest.raises(ClassificationError, match="ABORTED: the server's model was replaced during the call"):
        probability_table([one, two])


@given(st.lists(some_contents(), max_size=20), st.integers(1, 3), st.integers(1, 12), st.integers(1, 12), st.data())
def test_every_entry_travels_once_in_order_and_no_request_is_too_large(waiting, slots, images, thousands, data):
    capacity = Capacity(images, thousands * 1500)
    requests = SharedRequests[Entry](slots)
    expected = [Entry(content, Deadline(None)) for content in waiting]
    for entry in expected:
        requests.add(entry)
    under_way: list[list[Entry]] = []
    sent: list[Entry] = []
    while len(sent) < len(expected) or under_way:
        while group := requests.next_group(capacity):
            under_way.append(group)
            sent += group
            together = sum(entry.content.count for entry in group), sum(entry.content.size for entry in group)
            assert len(group) == 1 or (together[0] <= capacity.images and together[1] <= capacity.size)
        assert len(under_way) <= slots
        assert len(under_way) == slots or len(sent) == len(expected)  # no slot is left free while entries wait
        group = under_way.pop(data.draw(st.integers(0, len(under_way) - 1)))
        parts = distribute([entry.content for entry in group], answer(request_of([one.content for one in group])))
        requests.answered(group, parts)
    assert sent == expected
    for entry in expected:
        found = [tuple(row) for row in entry.result().probabilities.tolist()]
        assert found == [row_of(image) for image in images_of(entry.content)]


def test_a_lone_entry_is_sent_at_once_and_the_next_ones_gather_while_all_slots_are_taken():
    requests, capacity = SharedRequests[Entry](2), Capacity(100, 10**6)
    first, second, *others = (Entry(Content(pixels=pixels(seed)), Deadline(None)) for seed in range(6))
    requests.add(first)
    assert requests.next_group(capacity) == [first]
    requests.add(second)
    assert requests.next_group(capacity) == [second]
    for entry in others:
        requests.add(entry)
    assert requests.next_group(capacity) is None
    requests.answered([first], distribute([first.content], answer(request_of([first.content]))))
    # Half of the five images that are under way or waiting: the other half is for the second slot.
    assert requests.next_group(capacity) == others[:3]


@given(st.integers(2, 20), st.data())
def test_one_call_at_fault_fails_alone(count, data):
    culprit = data.draw(st.integers(0, count - 1))
    requests, capacity = SharedRequests[Entry](1), Capacity(1000, 10**7)
    blocker, *others = (Entry(Content(pixels=pixels(seed)), Deadline(None)) for seed in range(count + 1))
    for entry in (blocker, *others):
        requests.add(entry)
    sent = 0
    while group := requests.next_group(capacity):
        sent += 1
        if others[culprit] in group:
            requests.failed(group, RequestFailed(grpc.StatusCode.INTERNAL, "poisoned"))
        else:
            requests.answered(
                group, distribute([one.content for one in group], answer(request_of([one.content for one in group])))
            )
    for place, entry in enumerate(others):
        assert isinstance(entry.outcome, RequestFailed) == (place == culprit)
    assert sent <= 3 + 2 * count.bit_length()


def test_an_abandoned_entry_is_never_sent():
    requests = SharedRequests[Entry](1)
    first, second = (Entry(Content(pixels=pixels(seed)), Deadline(None)) for seed in range(2))
    requests.add(first)
    requests.add(second)
    requests.abandon(first)
    assert requests.next_group(Capacity(10, 10**6)) == [second]


@given(st.lists(st.tuples(st.booleans(), numbers), max_size=30), st.integers(1, 9), st.integers(1, 12))
def test_a_list_of_images_is_cut_in_order_into_contents_that_fit(sources, images, thousands):
    capacity = Capacity(images, thousands * 3100)
    arrays = [np.frombuffer(pixels(seed), np.uint8).reshape(32, 32, 3) for _, seed in sources]
    given_images = [array if raw else array.tobytes() for (raw, _), array in zip(sources, arrays, strict=True)]
    made = list(contents(given_images, lambda: capacity))
    assert [image for content in made for image in images_of(content)] == [array.tobytes() for array in arrays]
    assert all(content.count == 1 or content.fits(capacity) for content in made)
    smaller = Capacity(max(1, images // 2), 4000)
    again = [part for content in made for part in content.split(smaller)]
    assert [image for content in again for image in images_of(content)] == [array.tobytes() for array in arrays]
    assert all(content.count == 1 or content.fits(smaller) for content in again)


def test_only_small_calls_share_requests():
    assert is_small(Content(pixels=bytes(SMALL_IMAGES * IMAGE_BYTES)))
    assert not is_small(Content(pixels=bytes((SMALL_IMAGES + 1) * IMAGE_BYTES)))
    assert not is_small(Content(images=(messages.Image(encoded=bytes(2**18)),)))


def test_an_image_keeps_its_orientation_when_it_is_encoded():
    image = PillowImage.new("RGB", (4, 2))
    image.getexif()[0x0112] = 6
    (content,) = contents([image], lambda: Capacity(10, 10**6))
    assert b"eXIf" in content.images[0].encoded


def encoded(image: PillowImage.Image) -> bytes:
    """The file that the client sends for the image."""
    (content,) = contents([image], lambda: Capacity(10, 10**6))
    return content.images[0].encoded


MODES = [
    "1",
    "L",
    "LA",
    "P",
    "PA",
    "RGB",
    "RGBA",
    "RGBa",
    "RGBX",
    "CMYK",
    "YCbCr",
    "HSV",
    "LAB",
    "I;16",
    "I;16L",
    "I;16B",
]


@pytest.mark.parametrize("mode", MODES)
def test_a_pil_image_of_any_mode_has_the_pixels_that_the_servers_decoder_makes_of_it(mode):
    source = PillowImage.fromarray(np.random.default_rng(0).integers(0, 256, (150, 250, 4), np.uint8), "RGBA")
    if mode.startswith("I"):
        image = PillowImage.fromarray(np.random.default_rng(0).integers(0, 2**16, (150, 250), np.uint16))
        image = image if mode == image.mode else image.convert("I").convert(mode)
    elif mode == "LAB":
        image = PillowImage.frombytes("LAB", (250, 150), np.random.default_rng(0).bytes(250 * 150 * 3))
    elif mode == "PA":
        image = source.convert("RGB").convert("P").convert("PA")
    else:
        image = source.convert("RGB" if mode in ("CMYK", "YCbCr", "HSV", "LAB") else "RGBA").convert(mode)
    assert image.mode == mode
    np.testing.assert_array_equal(decode(encoded(image)), pixels_of(image, scalable=False))


def test_grey_that_is_multiplied_by_its_opacity_keeps_its_transparency():
    image = PillowImage.merge("LA", [PillowImage.linear_gradient("L"), PillowImage.radial_gradient("L")])
    sent = decode(encoded(image.convert("La"))).astype(int)
    assert np.abs(sent - decode(encoded(image))).max() <= 4  # the multiplication rounds


# No EXIF at all; an orientation of 6 and a maker (0x010f) that is a number; an orientation that is a text.
@pytest.mark.parametrize(
    ("exif", "orientation"),
    [
        (b"\xff" * 30, 1),
        (b"\x02\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\x0f\x01\x0b\0\x01\0\0\0" + bytes(8), 6),
        (b"\x01\0\x12\x01\x02\0\x03\0\0\0up\0\0" + bytes(4), 1),
    ],
    ids=["no EXIF", "damaged", "no number"],
)
def test_a_pil_image_with_damaged_exif_is_sent_with_the_orientation_that_the_decoder_finds(exif, orientation):
    file = io.BytesIO()
    picture = PillowImage.fromarray(pictures(1)[0])
    picture.save(file, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0" + exif)
    image = PillowImage.open(file)
    sent = encoded(image)
    assert PillowImage.open(io.BytesIO(sent)).getexif().get(0x0112, 1) == orientation
    np.testing.assert_array_equal(decode(sent), decode(file.getvalue()))


@pytest.mark.parametrize("is_loaded", [False, True])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_tiff_image_is_sent_as_it_is_shown(orientation, is_loaded):
    shown = PillowImage.fromarray(pictures(1)[0]).resize((64, 64))
    exif = PillowImage.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    shown.save(file, "TIFF", exif=exif)  # the pixels as they are stored
    with PillowImage.open(file) as image:
        turned = ImageOps.exif_transpose(PillowImage.open(io.BytesIO(file.getvalue())))
        if is_loaded:
            image.load()
        (content,) = contents([image], lambda: Capacity(10, 10**6))
    png = io.BytesIO()
    turned.save(png, "PNG")
    assert np.array_equal(decode(content.images[0].encoded), decode(png.getvalue()))


def test_a_file_that_no_message_can_hold_is_the_error_of_its_image_and_is_not_read(tmp_path):
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(2**31)
    good = tmp_path / "good.png"
    PillowImage.fromarray(pictures(1)[0]).save(good)
    sent = list(contents([tmp_path / "huge.png", good], lambda: Capacity(10, 10**6)))
    assert "the image takes 2147483648 bytes, but a message holds at most" in sent[0].error
    assert sent[1].images[0].encoded == good.read_bytes()


def test_a_path_of_a_pipe_or_with_a_null_character_is_an_error_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", "a\0b"):
        with pytest.raises(OSError, match=r"not a regular file|null"):
            list(contents([path], lambda: Capacity(10, 10**6)))


@pytest.mark.parametrize(("images", "queued", "capacity"), [(1024, 4096, 1024), (64, 64, 16), (64, 2, 1), (64, 0, 64)])
def test_the_requests_of_one_call_fit_into_the_server_together(images, queued, capacity):
    limits = messages.Limits(max_images=images, max_queued_images=queued, max_message_bytes=10**6)
    assert Capacity.of(limits, 4).images == capacity


def test_each_entry_of_a_failed_request_has_an_exception_of_its_own():
    requests = SharedRequests[Entry](1)
    entries = [Entry(Content(pixels=pixels(seed)), Deadline(None)) for seed in range(3)]
    for entry in entries:
        requests.add(entry)
    group = requests.next_group(Capacity(10, 10**6))
    assert group == entries
    requests.failed(group, RequestFailed(grpc.StatusCode.UNAVAILABLE, "gone", "20"))
    assert len({id(entry.outcome) for entry in entries}) == 3
    assert {(each.outcome.code.name, each.outcome.details, each.outcome.pushback) for each in entries} == {
        ("UNAVAILABLE", "gone", "20")
    }
