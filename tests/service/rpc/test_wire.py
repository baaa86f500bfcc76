import random

import pytest
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st

from service.errors import InvalidRequest
from service.generated.cifar.v1 import image_classifier_pb2 as cifar
from service.generated.inference import open_inference_pb2 as inference
from service.rpc import classify, open_inference
from service.rpc.wire import FieldCounter


def accepted(counter: FieldCounter, message: Message | bytes) -> bool:
    try:
        counter.check(message if isinstance(message, bytes) else message.SerializeToString())
    except InvalidRequest:
        return False
    return True


images = st.lists(
    st.one_of(
        st.just(cifar.Image()),
        st.binary(max_size=40).map(lambda data: cifar.Image(rgb=data)),
        st.binary(max_size=40).map(lambda data: cifar.Image(encoded=data)),
    ),
    max_size=40,
)


@given(images, st.binary(max_size=300), st.integers(0, 100))
def test_a_message_is_accepted_if_and_only_if_it_has_no_more_fields_than_allowed(pictures, packed, limit):
    message = cifar.ClassifyRequest(images=pictures, packed_rgb=packed, top_k=3)
    fields = 1 + bool(packed) + sum(1 + (picture.WhichOneof("content") is not None) for picture in pictures)
    counter = FieldCounter(cifar.ClassifyRequest, limit)
    small = len(message.SerializeToString()) <= 2 * limit  # so short that it cannot have too many
    assert accepted(counter, message) == (small or fields <= limit)


@given(st.binary(max_size=500))
def test_any_bytes_are_either_accepted_or_refused(data):
    for message_type in (cifar.ClassifyRequest, inference.ModelInferRequest):
        accepted(FieldCounter(message_type, 20), data)


@given(st.integers(0, 10**9))
def test_messages_that_the_parser_accepts_are_not_refused_as_malformed(seed):
    generator = random.Random(seed)
    message = inference.ModelInferRequest(model_name="cifar10", id=str(seed))
    tensor = message.inputs.add(name="images", datatype="UINT8", shape=[generator.randrange(2**60) for _ in range(4)])
    tensor.contents.uint_contents.extend(generator.randrange(256) for _ in range(100))
    tensor.contents.fp32_contents.extend(generator.random() for _ in range(5))
    message.parameters["timeout"].int64_param = generator.randrange(-(2**62), 2**62)
    message.parameters["ratio"].double_param = generator.random()
    message.outputs.add(name="logits").parameters["classification"].int64_param = 3
    FieldCounter(inference.ModelInferRequest, 10**6).check(message.SerializeToString())
    assert accepted(FieldCounter(inference.ModelInferRequest, 250), message)


MANY = 200_000


@pytest.mark.parametrize(
    ("counter", "message"),
    [
        (classify.field_counter(1024), b"\x12\x00" * MANY),  # empty images
        (classify.field_counter(1024), b"\x20\x01" * MANY),  # top_k again and again
        (classify.field_counter(1024), b"\xf8\x01\x00" * MANY),  # unknown fields
        (classify.field_counter(1024), cifar.ClassifyRequest(images=[cifar.Image(rgb=b"")] * MANY).SerializeToString()),
        (open_inference.field_counter(1024), b"\x2a\x00" * MANY),  # empty inputs
        (open_inference.field_counter(1024), b"\x22\x00" * MANY),  # empty parameters
        (
            open_inference.field_counter(1024),
            inference.ModelInferRequest(inputs=[{"name": "images", "shape": [1] * MANY}]).SerializeToString(),
        ),
        (
            open_inference.field_counter(1024),
            inference.ModelInferRequest(inputs=[{"contents": {"bytes_contents": [b""] * MANY}}]).SerializeToString(),
        ),
    ],
)
def test_a_message_of_many_small_fields_is_refused_before_it_is_parsed(counter, message):
    with pytest.raises(InvalidRequest, match="more than 4160 fields"):
        counter.check(message)


def test_as_many_images_as_allowed_are_accepted_in_every_form():
    picture = cifar.Image(rgb=bytes(3072))
    assert accepted(classify.field_counter(1024), cifar.ClassifyRequest(images=[picture] * 1024, request_id="a"))
    raw = inference.ModelInferRequest(
        inputs=[{"name": "images", "shape": [1024, 32, 32, 3]}], raw_input_contents=[bytes(1024 * 3072)]
    )
    assert accepted(open_inference.field_counter(1024), raw)


def test_pixels_as_single_numbers_are_limited_by_their_bytes():
    numbers = {"uint_contents": [1] * open_inference.MAX_NUMBER_BYTES}
    assert accepted(open_inference.field_counter(4), inference.ModelInferRequest(inputs=[{"contents": numbers}]))
    half = inference.ModelInferRequest(inputs=[{"contents": {"uint_contents": [1] * 2**19}}]).SerializeToString()
    with pytest.raises(InvalidRequest, match="1572864 bytes of numbers"):  # however it is divided
        open_inference.field_counter(4).check(half * 3)
    numbers["uint_contents"].append(1)
    with pytest.raises(InvalidRequest, match="1048577 bytes of numbers in one field; at most 1048576"):
        open_inference.field_counter(4).check(
            inference.ModelInferRequest(inputs=[{"contents": numbers}]).SerializeToString()
        )


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (b"\x12" + b"\xff" * 11, "a number has more than 10 bytes"),
        (b"\x12\xff\x7f" + b"\x12\x00" * 40, "beyond its message"),
        (b"\x13\x14" * 10, "wire type 3"),
        (b"\x0a\x08" + bytes(8) + b"\x0a\xff", "cut off"),
    ],
)
def test_bytes_that_are_not_a_message_are_refused_with_the_reason(message, reason):
    with pytest.raises(InvalidRequest, match=f"not a message of its type: .*{reason}"):
        FieldCounter(cifar.ClassifyRequest, 5).check(message)


def test_the_limit_of_numbers_holds_for_each_message_and_not_for_all_together():
    numbers = {"uint_contents": [1] * (open_inference.MAX_NUMBER_BYTES // 2)}
    message = inference.ModelInferRequest(inputs=[{"contents": numbers}])
    counter = open_inference.field_counter(4)  # a server has one for all requests
    assert all(accepted(counter, message) for _ in range(3))
