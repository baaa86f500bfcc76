import queue
import threading
from collections.abc import Iterator

import grpc
import numpy as np
import pytest

from service.generated.inference import open_inference_pb2 as messages
from service.generated.inference import open_inference_pb2_grpc as rpc
from service.rpc.streams import STREAM_WINDOW
from tests.service.conftest import until
from tests.service.exports import STALLING, expected, pictures, stalling


def infer_request(images: np.ndarray, identity: str = "", **parameters: bool) -> messages.ModelInferRequest:
    request = messages.ModelInferRequest(model_name="cifar10", id=identity, raw_input_contents=[images.tobytes()])
    request.inputs.add(name="images", datatype="UINT8", shape=images.shape)
    for name, value in parameters.items():
        request.parameters[name].bool_param = value
    return request


def probabilities(answer: messages.ModelStreamInferResponse) -> np.ndarray:
    assert not answer.error_message
    return np.frombuffer(answer.infer_response.raw_output_contents[1], "<f4").reshape(-1, 10)


@pytest.fixture
def stub(server):
    with grpc.insecure_channel(server.target) as channel:
        yield rpc.GRPCInferenceServiceStub(channel)


def test_answers_come_in_the_order_of_the_requests_and_carry_their_ids(stub):
    # Large requests are computed in several batches, so that small ones behind them are ready first.
    sizes = [200, 1, 1, 150, 1, 2, 90, 1] * 6
    requests = [infer_request(pictures(size, seed), str(seed)) for seed, size in enumerate(sizes)]
    answers = list(stub.ModelStreamInfer(iter(requests), timeout=60))
    assert [answer.infer_response.id for answer in answers] == [str(seed) for seed in range(len(sizes))]
    for seed, (size, answer) in enumerate(zip(sizes, answers, strict=True)):
        assert np.abs(probabilities(answer) - expected(0, pictures(size, seed))).max() < 1e-5


def test_a_request_that_fails_is_answered_with_its_error_and_the_stream_goes_on(stub):
    wrong = infer_request(pictures(1), "name")
    wrong.model_name = "resnet"
    broken = infer_request(stalling(1), "engine")  # this model fails on it
    requests = [infer_request(pictures(1), "good"), wrong, infer_request(pictures(401), "size"), broken]
    requests.append(infer_request(pictures(1), "last"))
    answered = threading.Semaphore(1)

    def one_by_one():
        for request in requests:
            answered.acquire()  # otherwise the engine could fail on a batch of several requests
            yield request

    answers = []
    for answer in stub.ModelStreamInfer(one_by_one(), timeout=60):
        answers.append(answer)
        answered.release()
    assert [answer.infer_response.id for answer in answers] == ["good", "name", "size", "engine", "last"]
    errors = [answer.error_message for answer in answers]
    assert (errors[0], errors[4]) == ("", "")
    assert "no model 'resnet'" in errors[1]
    assert "at most 400" in errors[2]
    assert "the computation of a batch" in errors[3]
    assert not answers[1].infer_response.outputs
    assert STALLING == 255


def test_the_last_answer_to_a_request_is_marked_if_the_client_asks_for_it(stub):
    requests = [infer_request(pictures(1)), infer_request(pictures(1), triton_enable_empty_final_response=True)]
    plain, marked = stub.ModelStreamInfer(iter(requests), timeout=60)
    assert "triton_final_response" not in plain.infer_response.parameters
    assert marked.infer_response.parameters["triton_final_response"].bool_param


def test_a_stream_holds_a_limited_number_of_requests_and_drains(start_server, slow):
    server = start_server(
        "--model", slow, "--threads", "1", "--max-batch-size", "1", "--decode-processes", "1", "--metrics-port", "0"
    ).ready()
    with grpc.insecure_channel(server.target) as channel:
        stub = rpc.GRPCInferenceServiceStub(channel)
        # Each of these images takes about a second, so none of the requests behind the first is answered soon.
        many = [infer_request(stalling(1)) for _ in range(STREAM_WINDOW + 20)]
        held = stub.ModelStreamInfer(iter(many))
        until(lambda: server.metrics()["cifar_service_admitted_images"] == STREAM_WINDOW)
        held.cancel()
        until(lambda: server.metrics()["cifar_service_admitted_images"] == 0)
        assert server.metrics()["cifar_service_engine_images_total"] < STREAM_WINDOW

        # Accepted requests are answered before the server ends; the stream is read no further.
        sent: queue.Queue[messages.ModelInferRequest | None] = queue.Queue()
        for request in (infer_request(stalling(1), "a"), infer_request(pictures(1), "b")):
            sent.put(request)
        answers: Iterator[messages.ModelStreamInferResponse] = stub.ModelStreamInfer(iter(sent.get, None))
        until(lambda: server.metrics()["cifar_service_admitted_images"] == 2)
        server.process.terminate()
        server.wait_for("stopping")
        assert [next(answers).infer_response.id for _ in range(2)] == ["a", "b"]
        with pytest.raises(grpc.RpcError) as caught:
            next(answers)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        sent.put(None)
    assert server.wait() == 0, server.log


def test_a_stream_ends_with_deadline_exceeded_whether_server_or_client_notices_first(start_server, slow):
    server = start_server("--model", slow, "--threads", "1", "--max-batch-size", "1", "--metrics-port", "0").ready()
    with grpc.insecure_channel(server.target) as channel:
        stub = rpc.GRPCInferenceServiceStub(channel)
        # These keep the engine busy, so that no request of the other streams is answered.
        held = stub.ModelStreamInfer(infer_request(stalling(1)) for _ in range(STREAM_WINDOW))
        until(lambda: server.metrics()["cifar_service_admitted_images"] == STREAM_WINDOW)
        for attempt in range(20):  # the server is the first in about every third
            with pytest.raises(grpc.RpcError) as caught:
                list(stub.ModelStreamInfer(iter([infer_request(pictures(1))]), timeout=0.03 + attempt / 1e4))
            assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        held.cancel()
        until(lambda: server.metrics()["cifar_service_admitted_images"] == 0)
        method = 'method="inference.GRPCInferenceService/ModelStreamInfer"'
        counted = [value for name, value in server.metrics().items() if "requests_total" in name and method in name]
        assert 0 < sum(counted) <= STREAM_WINDOW + 20  # each was counted once


def test_a_request_with_a_deadline_of_its_own_does_not_end_the_stream(stub):
    early = infer_request(pictures(1))
    early.parameters["timeout"].int64_param = 1
    first, second = stub.ModelStreamInfer(iter([early, infer_request(pictures(1))]), timeout=60)
    assert "the deadline passed" in first.error_message
    assert not second.error_message
