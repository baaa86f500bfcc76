import json
import struct
import subprocess
import sys

import grpc
import numpy as np
import pytest

from service.generated.inference import open_inference_pb2 as messages
from service.generated.inference import open_inference_pb2_grpc as rpc
from tests.conftest import REPOSITORY
from tests.service.conftest import until
from tests.service.exports import CLASSES, expected, pictures, stalling


@pytest.fixture
def inference(server):
    with grpc.insecure_channel(server.target) as channel:
        yield rpc.GRPCInferenceServiceStub(channel)


def infer_request(images: np.ndarray, **changes: object) -> messages.ModelInferRequest:
    values = {
        "model_name": "cifar10",
        "inputs": [
            messages.ModelInferRequest.InferInputTensor(name="images", datatype="UINT8", shape=list(images.shape))
        ],
        "raw_input_contents": [images.tobytes()],
        **changes,
    }
    return messages.ModelInferRequest(**values)


def array(response: messages.ModelInferResponse, place: int) -> np.ndarray:
    return np.frombuffer(response.raw_output_contents[place], "<f4").reshape(response.outputs[place].shape)


def test_nvidias_client_works_unchanged(server, tmp_path):
    descriptor = tmp_path / "descriptor"
    descriptor.write_bytes(messages.DESCRIPTOR.serialized_pb)
    done = subprocess.run(
        [sys.executable, "-m", "tests.service.rpc.triton_session", server.target, str(descriptor)],
        cwd=REPOSITORY, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["differing_fields"] == []
    assert (seen["live"], seen["ready"], seen["model_ready"], seen["other_model_ready"]) == (True, True, True, False)
    assert seen["server"]["name"] == "cifar-classifier"
    assert seen["model"]["inputs"] == [{"name": "images", "datatype": "UINT8", "shape": ["-1", "32", "32", "3"]}]
    assert [output["name"] for output in seen["model"]["outputs"]] == ["logits", "probabilities"]
    config = seen["config"]["config"]
    assert (config["name"], config["max_batch_size"]) == ("cifar10", 400)
    assert config["input"] == [{"name": "images", "data_type": "TYPE_UINT8", "dims": ["32", "32", "3"]}]
    assert seen["sync"] < 1e-5
    assert seen["async"] < 1e-5
    assert seen["both"] == ["logits", "probabilities"]
    assert seen["id"] == "mine"
    for row, texts in zip(expected(0, pictures(5)), seen["classification"], strict=True):
        best = np.argsort(-row)[:2]
        assert texts == [f"{row[index]:f}:{index}:{CLASSES[index]}" for index in best] or [
            text.split(":")[1:] for text in texts
        ] == [[str(index), CLASSES[index]] for index in best]
    assert seen["errors"] == {
        "model": "StatusCode.NOT_FOUND",
        "version": "StatusCode.NOT_FOUND",
        "type": "StatusCode.INVALID_ARGUMENT",
        "shape": "StatusCode.INVALID_ARGUMENT",
        "name": "StatusCode.INVALID_ARGUMENT",
        "output": "StatusCode.INVALID_ARGUMENT",
        "sequence": "StatusCode.UNIMPLEMENTED",
        "metadata": "StatusCode.NOT_FOUND",
        "load": "StatusCode.UNIMPLEMENTED",
    }
    assert seen["streamed"] == [["0", ""], ["1", "wrong"], ["2", ""], ["3", ""]]
    statistics = seen["statistics"]
    assert statistics["version"] == "1"
    assert int(statistics["inference_stats"]["success"]["count"]) >= 22
    assert int(statistics["inference_count"]) >= 22 * 5
    assert int(statistics["execution_count"]) == sum(
        int(batch["compute_infer"]["count"]) for batch in statistics["batch_stats"]
    )


def test_raw_inputs_get_raw_outputs(inference):
    images = pictures(4)
    response = inference.ModelInfer(infer_request(images, id="7"))
    assert (response.model_name, response.model_version, response.id) == ("cifar10", "1", "7")
    assert response.parameters["export"].string_param == "linear-0"
    assert [output.name for output in response.outputs] == ["logits", "probabilities"]
    assert np.abs(array(response, 1) - expected(0, images)).max() < 1e-5
    softmax = np.exp(array(response, 0)) / np.exp(array(response, 0)).sum(axis=1, keepdims=True)
    assert np.abs(softmax - expected(0, images)).max() < 1e-5


def test_typed_inputs_get_typed_outputs(inference):
    images = pictures(2)
    request = infer_request(images, raw_input_contents=[])
    request.inputs[0].contents.uint_contents.extend(images.ravel().tolist())
    response = inference.ModelInfer(request)
    assert not response.raw_output_contents
    probabilities = np.array(response.outputs[1].contents.fp32_contents).reshape(response.outputs[1].shape)
    assert np.abs(probabilities - expected(0, images)).max() < 1e-5


def test_only_the_requested_outputs_are_returned_in_the_requested_order(inference):
    wanted = messages.ModelInferRequest.InferRequestedOutputTensor
    response = inference.ModelInfer(infer_request(pictures(1), outputs=[wanted(name="probabilities")]))
    assert [output.name for output in response.outputs] == ["probabilities"]
    both = [wanted(name="probabilities"), wanted(name="logits")]
    response = inference.ModelInfer(infer_request(pictures(1), outputs=both))
    assert [output.name for output in response.outputs] == ["probabilities", "logits"]


def test_a_classification_is_a_list_of_texts_with_value_index_and_label(inference):
    output = messages.ModelInferRequest.InferRequestedOutputTensor(name="logits")
    output.parameters["classification"].int64_param = 3
    response = inference.ModelInfer(infer_request(pictures(2), outputs=[output]))
    assert (response.outputs[0].datatype, list(response.outputs[0].shape)) == ("BYTES", [2, 3])
    raw = response.raw_output_contents[0]
    (length,) = struct.unpack_from("<I", raw)
    value, index, label = raw[4 : 4 + length].decode().split(":")
    assert label == CLASSES[int(index)]
    assert int(index) == expected(0, pictures(2))[0].argmax()
    float(value)


def test_a_request_may_name_the_version_that_is_served(inference):
    assert inference.ModelInfer(infer_request(pictures(1), model_version="1")).model_version == "1"
    assert inference.ModelReady(messages.ModelReadyRequest(name="cifar10", version="1")).ready


@pytest.mark.parametrize("wrong", [{"model_name": "resnet"}, {"model_version": "2"}, {"model_version": "linear-0"}])
def test_another_model_or_version_is_not_found(inference, wrong):
    with pytest.raises(grpc.RpcError) as caught:
        inference.ModelInfer(infer_request(pictures(1), **wrong))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    name, version = wrong.get("model_name", "cifar10"), wrong.get("model_version", "")
    assert not inference.ModelReady(messages.ModelReadyRequest(name=name, version=version)).ready


@pytest.mark.parametrize("field", ["uint_contents", "fp32_contents"])
def test_raw_and_typed_elements_together_are_refused(inference, field):
    request = infer_request(pictures(1))
    getattr(request.inputs[0].contents, field).append(1)
    with pytest.raises(grpc.RpcError, match="both contents and raw_input_contents") as caught:
        inference.ModelInfer(request)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_elements_in_a_field_of_another_type_are_refused(inference):
    request = infer_request(pictures(1), raw_input_contents=[])
    request.inputs[0].contents.uint_contents.extend(pictures(1).ravel().tolist())
    request.inputs[0].contents.int_contents.append(1)
    with pytest.raises(grpc.RpcError, match="has int_contents; UINT8 elements are sent in uint_contents"):
        inference.ModelInfer(request)


def test_the_limit_of_names_and_parameters_leaves_out_the_elements_in_any_form(inference):
    for images, text, status in (
        (1, 60_000, None),
        (1, 66_000, grpc.StatusCode.INVALID_ARGUMENT),
        (100, 60_000, None),
    ):
        raw = infer_request(pictures(images))
        typed = infer_request(pictures(images), raw_input_contents=[])
        typed.inputs[0].contents.uint_contents.extend(pictures(images).ravel().tolist())
        for request in (raw, typed):
            request.parameters["note"].string_param = "x" * text
            if status is None:
                assert inference.ModelInfer(request).outputs
                continue
            with pytest.raises(grpc.RpcError, match="besides its pixels") as caught:
                inference.ModelInfer(request)
            assert caught.value.code() is status


def test_a_timeout_of_zero_means_no_limit_and_a_short_one_is_a_deadline(inference, start_server, slow):
    request = infer_request(pictures(1))
    request.parameters["timeout"].int64_param = 0
    assert inference.ModelInfer(request).outputs

    server = start_server("--model", slow, "--threads", "1", "--max-batch-size", "1", "--metrics-port", "0").ready()
    with grpc.insecure_channel(server.target) as channel:
        busy = rpc.GRPCInferenceServiceStub(channel)
        occupying = busy.ModelInfer.future(infer_request(stalling(2)))
        until(lambda: server.metrics()["cifar_service_admitted_images"] == 2)
        request.parameters["timeout"].int64_param = 20_000
        with pytest.raises(grpc.RpcError) as caught:
            busy.ModelInfer(request)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert not occupying.done()  # so the answer came while the engine was busy
        assert occupying.result().outputs


def test_the_server_describes_itself(inference):
    assert inference.ServerLive(messages.ServerLiveRequest()).live
    assert inference.ServerReady(messages.ServerReadyRequest()).ready
    metadata = inference.ServerMetadata(messages.ServerMetadataRequest())
    assert metadata.name == "cifar-classifier"
    assert "statistics" in metadata.extensions
    model = inference.ModelMetadata(messages.ModelMetadataRequest(name="cifar10"))
    assert list(model.versions) == ["1"]
    assert model.parameters["export"].string_param == "linear-0"
