"""The message that is put together from bytes is the one that protobuf would make."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from service.generated.cifar.v1 import image_classifier_pb2 as messages
from service.rpc import ranked


@st.composite
def answers(draw: st.DrawFn) -> tuple[np.ndarray, tuple[str, ...], int, dict[int, messages.ImageError]]:
    classes = tuple(draw(st.lists(st.text(max_size=200), min_size=1, max_size=300, unique=True)))
    images = draw(st.integers(0, 5))
    # Few different values, so that many are equal; among them zero, which protobuf leaves out.
    values = st.sampled_from([0.0, 1e-30, 0.25, 0.5, 1.0])
    rows = draw(st.lists(values, min_size=images * len(classes), max_size=images * len(classes)))
    errors = {
        index: messages.ImageError(code=3, message="e" * draw(st.integers(0, 300)))
        for index in draw(st.sets(st.integers(0, images), max_size=2))
    }
    errors = {index: error for place, (index, error) in enumerate(sorted(errors.items())) if index <= images + place}
    return np.array(rows, np.float32).reshape(images, len(classes)), classes, draw(st.integers(0, 400)), errors


@given(answers())
def test_the_message_is_the_one_that_protobuf_makes(answer):
    probabilities, classes, top_k, errors = answer
    wanted = messages.ClassifyResponse()
    rows = iter(probabilities.tolist())
    for index in range(len(probabilities) + len(errors)):
        result = wanted.results.add()
        if index in errors:
            result.error.CopyFrom(errors[index])
            continue
        row = next(rows)
        for number in sorted(range(len(row)), key=lambda number: (-row[number], number))[: top_k or None]:
            result.classes.add(name=classes[number], index=number, probability=row[number])
    assert ranked.results(probabilities, classes, top_k, errors) == wanted


def test_rows_of_another_number_type_are_converted():
    response = ranked.results(np.array([[0.75, 0.25]], ">f4"), ("a", "b"), 1, {})
    assert response.results[0].classes[0] == messages.RankedClass(name="a", index=0, probability=0.75)
