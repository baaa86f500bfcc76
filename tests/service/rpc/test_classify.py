import io
import threading

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from PIL import Image as PillowImage

from service.generated.cifar.v1 import image_classifier_pb2 as messages
from service.generated.cifar.v1 import image_classifier_pb2_grpc as rpc
from tests.service.conftest import table, until
from tests.service.exports import CLASSES, expected, pictures


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    PillowImage.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def close(response: messages.ClassifyResponse, images: np.ndarray) -> bool:
    return bool(np.abs(np.array(table(response)) - expected(0, images)).max() < 1e-5)


def test_files_raw_pixels_and_packed_pixels_are_answered_in_order(stub):
    images = pictures(7)
    request = messages.ClassifyRequest(
        request_id="mine",
        images=[
            messages.Image(encoded=png(images[0])),
            messages.Image(rgb=images[1].tobytes()),
            messages.Image(encoded=png(images[2])),
        ],
        packed_rgb=images[3:].tobytes(),
    )
    response = stub.Classify(request)
    assert close(response, images)
    assert response.request_id == "mine"
    assert response.model_version == "linear-0"


@pytest.mark.parametrize("count", [1, 31, 32, 33, 400])
def test_a_request_of_any_allowed_size_is_answered_in_order(stub, count):
    images = pictures(count, seed=count)
    assert close(stub.Classify(messages.ClassifyRequest(packed_rgb=images.tobytes())), images)


def test_classes_are_ordered_by_decreasing_probability_with_names_and_indices(stub):
    images = pictures(20)
    for result, row in zip(
        stub.Classify(messages.ClassifyRequest(packed_rgb=images.tobytes())).results, expected(0, images), strict=True
    ):
        probabilities = [ranked.probability for ranked in result.classes]
        assert probabilities == sorted(probabilities, reverse=True)
        assert [ranked.index for ranked in result.classes] == np.argsort(-row).tolist()
        assert all(ranked.name == CLASSES[ranked.index] for ranked in result.classes)
        assert sum(probabilities) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(("top_k", "count"), [(0, 10), (1, 1), (3, 3), (10, 10), (99, 10)])
def test_top_k_is_the_number_of_classes(stub, top_k, count):
    response = stub.Classify(messages.ClassifyRequest(packed_rgb=bytes(2 * 3072), top_k=top_k))
    assert [len(result.classes) for result in response.results] == [count, count]


def test_an_unreadable_image_does_not_affect_the_others(stub):
    images = pictures(3)
    request = messages.ClassifyRequest(
        images=[
            messages.Image(encoded=b"no image"),
            messages.Image(encoded=png(images[0])),
            messages.Image(),
            messages.Image(rgb=images[1].tobytes()),
            messages.Image(rgb=bytes(3071)),
        ],
        packed_rgb=images[2].tobytes(),
    )
    response = stub.Classify(request)
    errors = [result.error.code if result.HasField("error") else 0 for result in response.results]
    assert errors == [3, 0, 3, 0, 3, 0]
    assert "not an image in PNG" in response.results[0].error.message
    assert "neither 'encoded' nor 'rgb'" in response.results[2].error.message
    assert "3071 bytes" in response.results[4].error.message
    good = messages.ClassifyResponse(results=[result for result in response.results if not result.HasField("error")])
    assert close(good, images)


def test_a_table_has_the_same_answers_as_the_results(stub):
    images = pictures(3)
    request = messages.ClassifyRequest(
        request_id="table",
        images=[
            messages.Image(encoded=b"no image"),
            messages.Image(encoded=png(images[0])),
            messages.Image(rgb=images[1].tobytes()),
            messages.Image(rgb=bytes(3071)),
        ],
        packed_rgb=images[2].tobytes(),
        top_k=1,
    )
    ranked = stub.Classify(request).results
    request.as_table = True
    response = stub.Classify(request)
    assert (response.request_id, response.model_version, len(response.results)) == ("table", "linear-0", 0)
    assert tuple(response.table.classes) == CLASSES
    table = np.frombuffer(response.table.probabilities, "<f4").reshape(5, 10)
    assert np.allclose(table[[1, 2, 4]], expected(0, images), atol=1e-5)
    assert not table[[0, 3]].any()
    assert dict(response.table.errors) == {0: ranked[0].error, 3: ranked[3].error}
    assert [ranked[index].classes[0].index for index in (1, 2, 4)] == table[[1, 2, 4]].argmax(axis=1).tolist()


def test_a_table_of_unreadable_images_has_only_errors(stub):
    request = messages.ClassifyRequest(images=[messages.Image(encoded=b"no image")] * 2, as_table=True)
    table = stub.Classify(request).table
    assert (sorted(table.errors), tuple(table.classes), table.probabilities) == ([0, 1], CLASSES, bytes(2 * 10 * 4))


def test_a_request_with_only_unreadable_images_is_answered_too(stub):
    response = stub.Classify(messages.ClassifyRequest(images=[messages.Image(encoded=b"no image")] * 2))
    assert [result.error.code for result in response.results] == [3, 3]
    assert response.model_version == "linear-0"


def test_get_model_returns_the_model_and_the_limits(stub):
    model = stub.GetModel(messages.GetModelRequest())
    assert (model.name, model.version, model.variant, model.device) == ("cifar10", "linear-0", "fp32", "cpu")
    assert tuple(model.classes) == CLASSES
    assert (model.input_height, model.input_width, model.test_accuracy) == (32, 32, 0.5)
    assert model.limits == messages.Limits(
        max_images=400,
        max_image_bytes=8_000_000,
        max_image_pixels=32_000_000,
        max_message_bytes=8 * 2**20,
        max_queued_images=4096,
    )


def test_an_engine_error_fails_only_its_own_batch(stub, server):
    poisoned = pictures(1)
    poisoned[0, 0, 0, 0] = 255
    before = server.metrics()["cifar_service_engine_failures_total"]
    with pytest.raises(grpc.RpcError) as caught:
        stub.Classify(messages.ClassifyRequest(packed_rgb=poisoned.tobytes()))
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert "the computation of a batch with these images failed" in caught.value.details()
    assert server.metrics()["cifar_service_engine_failures_total"] == before + 1
    images = pictures(5)
    assert close(stub.Classify(messages.ClassifyRequest(packed_rgb=images.tobytes())), images)


def test_requests_at_the_same_time_get_their_own_answers(server):
    failures = []

    def ask(seed: int) -> None:
        with grpc.insecure_channel(server.target) as channel:
            stub = rpc.ImageClassifierStub(channel)
            for turn in range(10):
                images = pictures(1 + (seed * 7 + turn) % 40, seed=1000 * seed + turn)
                if not close(stub.Classify(messages.ClassifyRequest(packed_rgb=images.tobytes())), images):
                    failures.append((seed, turn))

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


# Streams


def test_a_stream_answers_every_request_by_its_id(stub):
    requests = {str(number): pictures(1 + number % 50, seed=number) for number in range(80)}
    responses = list(
        stub.ClassifyStream(
            messages.ClassifyRequest(request_id=key, packed_rgb=images.tobytes()) for key, images in requests.items()
        )
    )
    assert sorted(response.request_id for response in responses) == sorted(requests)
    assert all(close(response, requests[response.request_id]) for response in responses)


def test_a_bad_request_in_a_stream_is_answered_there_and_the_stream_goes_on(stub):
    images = pictures(2)
    requests = [
        messages.ClassifyRequest(request_id="empty"),
        messages.ClassifyRequest(request_id="odd", packed_rgb=bytes(100)),
        messages.ClassifyRequest(request_id="good", packed_rgb=images.tobytes()),
        messages.ClassifyRequest(request_id="many", packed_rgb=bytes(401 * 3072)),
    ]
    by_id = {response.request_id: response for response in stub.ClassifyStream(iter(requests))}
    assert {key: response.error.code for key, response in by_id.items()} == {"empty": 3, "odd": 3, "good": 0, "many": 3}
    assert "holds no images" in by_id["empty"].error.message
    assert "at most 400 are allowed" in by_id["many"].error.message
    assert close(by_id["good"], images)


def test_a_stream_can_be_a_conversation(stub):
    asked = threading.Semaphore(1)
    last = threading.Event()

    def requests():
        for number in range(5):
            assert asked.acquire(timeout=30)  # only after the previous answer
            yield messages.ClassifyRequest(request_id=str(number), packed_rgb=bytes(3072))
        last.set()

    answers = []
    for response in stub.ClassifyStream(requests()):
        answers.append(response.request_id)
        asked.release()
    assert answers == list("01234")
    assert last.is_set()


def test_a_client_that_reads_no_answers_is_slowed_down(server):
    sent = 0

    def requests():
        nonlocal sent
        for _ in range(3000):
            sent += 1
            yield messages.ClassifyRequest(packed_rgb=bytes(100 * 3072), request_id="x" * 1000)

    with grpc.insecure_channel(server.target) as channel:
        call = rpc.ImageClassifierStub(channel).ClassifyStream(requests())
        previous = -1
        while sent != previous:  # until the server takes no more
            previous = sent
            threading.Event().wait(1.5)
        assert sent < 1000
        call.cancel()


def test_cancelled_streams_free_their_slots_and_the_server_survives(linear, start_server):
    # At debug level the log names the client of each request; gRPC crashes if it is asked for the client too late.
    server = start_server("--model", linear, "--metrics-port", "0", "--log-level", "debug").ready()
    with grpc.insecure_channel(server.target) as channel:
        stub = rpc.ImageClassifierStub(channel)
        for count in range(200):
            call = stub.ClassifyStream(iter([messages.ClassifyRequest(packed_rgb=bytes(3072))] * 20))
            for _ in range(count % 8):
                next(call)
            call.cancel()
        until(lambda: server.metrics()["cifar_service_requests_in_flight"] == 0)
        assert len(stub.Classify(messages.ClassifyRequest(packed_rgb=bytes(3072))).results) == 1
    assert server.stop() == 0


def test_a_stream_whose_client_vanishes_while_answers_wait_leaves_nothing_in_flight(linear, start_server):
    server = start_server("--model", linear, "--metrics-port", "0").ready()
    request = messages.ClassifyRequest(packed_rgb=bytes(100 * 3072), request_id="x" * 1000)
    for _ in range(3):
        # The client reads no answers, so that the window of the stream fills, and then goes.
        channel = grpc.insecure_channel(server.target, [("grpc.use_local_subchannel_pool", 1)])
        call = rpc.ImageClassifierStub(channel).ClassifyStream(iter([request] * 500))
        until(lambda: server.metrics()["cifar_service_requests_in_flight"] >= 32)
        channel.close()
        del call
    until(lambda: server.metrics()["cifar_service_requests_in_flight"] == 0)
    assert server.stop() == 0
    assert server.wait_for('"stopped"')["unanswered"] == 0


def test_a_long_text_where_no_images_are_expected_is_refused(server):
    long = "x" * 20_000
    with grpc.insecure_channel(server.target) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            list(health.Watch(health_pb2.HealthCheckRequest(service=long)))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "at most 16384 are allowed" in caught.value.details()
        with pytest.raises(grpc.RpcError) as caught:
            health.Check(health_pb2.HealthCheckRequest(service=long))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
