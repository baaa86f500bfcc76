import json
import struct
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from tests.conftest import REPOSITORY
from tests.service.exports import CLASSES, expected, pictures, stalling
from tests.service.http.web import Reply, Web

INFER = "/v2/models/cifar10/infer"


def infer_json(content: dict[str, Any]) -> bytes:
    return json.dumps(content).encode()


def binary_body(content: dict[str, Any], raw: bytes) -> tuple[bytes, dict[str, str]]:
    """A body with the binary tensor extension, and its headers."""
    head = infer_json(content)
    return head + raw, {
        "Inference-Header-Content-Length": str(len(head)), "Content-Type": "application/octet-stream"
    }  # fmt: skip


def described(images: np.ndarray, **changes: object) -> dict[str, Any]:
    return {"name": "images", "datatype": "UINT8", "shape": list(images.shape), **changes}


def infer(web: Web, images: np.ndarray, data: object = None, **changes: object) -> Reply:
    data = images.ravel().tolist() if data is None else data
    return web.request("POST", INFER, infer_json({"inputs": [described(images, data=data)], **changes}))


def infer_binary(web: Web, images: np.ndarray, **changes: object) -> Reply:
    tensor = described(images, parameters={"binary_data_size": images.nbytes})
    return web.request("POST", INFER, *binary_body({"inputs": [tensor], **changes}, images.tobytes()))


def outputs(reply: Reply) -> dict[str, np.ndarray]:
    """The outputs by name, whether they came as JSON or as bytes."""
    assert reply.status == 200, reply.body
    length = int(reply.headers.get("inference-header-content-length", len(reply.body)))
    head, raw = json.loads(reply.body[:length]), reply.body[length:]
    found = {}
    for output in head["outputs"]:
        if "data" in output:
            found[output["name"]] = np.array(output["data"]).reshape(output["shape"])
        else:
            size = output["parameters"]["binary_data_size"]
            found[output["name"]] = np.frombuffer(raw[:size], "<f4").reshape(output["shape"])
            raw = raw[size:]
    assert not raw
    return found


def test_json_inputs_get_json_outputs(web):
    images = pictures(2)
    reply = infer(web, images, id="7")
    assert reply.kind == "application/json"
    assert (reply.json["model_name"], reply.json["id"]) == ("cifar10", "7")
    found = outputs(reply)
    assert list(found) == ["logits", "probabilities"]
    assert np.abs(found["probabilities"] - expected(0, images)).max() < 1e-5
    softmax = np.exp(found["logits"]) / np.exp(found["logits"]).sum(axis=1, keepdims=True)
    assert np.abs(softmax - expected(0, images)).max() < 1e-5


def test_elements_may_be_nested_lists(web):
    images = pictures(2)
    for data in (images.tolist(), images.ravel().tolist()):
        assert np.abs(outputs(infer(web, images, data))["probabilities"] - expected(0, images)).max() < 1e-5


def test_binary_inputs_and_outputs(web):
    images = pictures(5)
    reply = infer_binary(web, images, parameters={"binary_data_output": True})
    assert reply.kind == "application/octet-stream"
    assert np.abs(outputs(reply)["probabilities"] - expected(0, images)).max() < 1e-5
    assert infer_binary(web, images).kind == "application/json"  # as the extension says


def test_each_output_has_the_form_that_is_asked_for_it(web):
    images = pictures(3)
    wanted = [{"name": "probabilities", "parameters": {"binary_data": True}}, {"name": "logits"}]
    reply = infer(web, images, outputs=wanted)
    found = outputs(reply)
    assert list(found) == ["probabilities", "logits"]
    assert np.abs(found["probabilities"] - expected(0, images)).max() < 1e-5
    length = int(reply.headers["inference-header-content-length"])
    assert "data" in json.loads(reply.body[:length])["outputs"][1]


def test_a_classification_is_a_list_of_texts_with_value_index_and_label(web):
    images = pictures(2)
    output = {"name": "probabilities", "parameters": {"classification": 3}}
    (answer,) = infer(web, images, outputs=[output]).json["outputs"]
    assert (answer["datatype"], answer["shape"]) == ("BYTES", [2, 3])
    value, index, label = answer["data"][0].split(":")
    assert label == CLASSES[int(index)]
    assert int(index) == expected(0, images)[0].argmax()
    assert float(value) == pytest.approx(expected(0, images)[0].max(), abs=1e-5)
    output["parameters"]["binary_data"] = True
    reply = infer(web, images, outputs=[output])
    raw = reply.body[int(reply.headers["inference-header-content-length"]) :]
    (size,) = struct.unpack_from("<I", raw)
    assert raw[4 : 4 + size].decode() == answer["data"][0]


def test_server_and_model_are_described(web):
    assert web.get("/v2").json["name"] == "cifar-classifier"
    assert "binary_tensor_data" in web.get("/v2").json["extensions"]
    assert web.get("/v2/health/live").json == {"live": True}
    assert web.get("/v2/health/ready").json == {"ready": True}
    model = web.get("/v2/models/cifar10").json
    assert model["inputs"] == [{"name": "images", "datatype": "UINT8", "shape": [-1, 32, 32, 3]}]
    assert [output["name"] for output in model["outputs"]] == ["logits", "probabilities"]
    (version,) = model["versions"]
    for path in ("/v2/models/cifar10", f"/v2/models/cifar10/versions/{version}"):
        assert web.get(path).json == model
        assert web.get(f"{path}/ready").json == {"name": "cifar10", "ready": True}
        assert web.get(f"{path}/config").json["max_batch_size"] == 400
    images = pictures(1)
    body = infer_json({"inputs": [described(images, data=images.tolist())]})
    reply = web.request("POST", f"/v2/models/cifar10/versions/{version}/infer", body)
    assert reply.json["model_version"] == version


@pytest.mark.parametrize("path", ["", "/ready", "/config", "/stats"])
def test_other_models_and_versions_are_not_found(web, path):
    for name in ("resnet", "cifar10/versions/none"):
        reply = web.get(f"/v2/models/{name}{path}")
        assert reply.status == 404
        assert reply.json["error"] == reply.json["detail"]


def test_statistics_count_requests_and_failures(web):
    def read() -> tuple[int, int, int]:
        (stats,) = web.get("/v2/models/cifar10/stats").json["model_stats"]
        times = stats["inference_stats"]
        return stats["inference_count"], times["success"]["count"], times["fail"]["count"]

    before = read()
    assert infer_binary(web, pictures(5)).status == 200
    assert infer_binary(web, stalling(1)).status == 500  # this model fails on it
    after = read()
    assert [new - old for new, old in zip(after, before, strict=True)][1:] == [1, 1]
    assert after[0] - before[0] >= 5
    assert web.get("/v2/models/stats").json["model_stats"][0]["name"] == "cifar10"


@pytest.mark.parametrize("kind", ["sync", "aio"])
def test_nvidias_client_works_unchanged(http_server, kind):
    done = subprocess.run(
        [sys.executable, "-m", "tests.service.http.triton_session", http_server.http_url, kind],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert (seen["live"], seen["ready"], seen["model_ready"], seen["other_model_ready"]) == (True, True, True, False)
    assert seen["server"]["name"] == "cifar-classifier"
    assert seen["model"]["inputs"] == [{"name": "images", "datatype": "UINT8", "shape": [-1, 32, 32, 3]}]
    assert seen["config"]["max_batch_size"] == 400
    assert int(seen["statistics"]["model_stats"][0]["inference_count"]) >= 5
    assert seen["binary"] < 1e-5
    assert seen["json"] < 1e-5
    assert seen["together"] < 1e-5
    assert seen["id"] == "mine"
    for row, texts in zip(expected(0, pictures(5)), seen["classification"], strict=True):
        assert [int(text.split(":")[1]) for text in texts] == np.argsort(-row)[:2].tolist()
    statuses = {
        "model": "404", "version": "404", "type": "400", "shape": "400", "name": "400", "output": "400",
        "sequence": "400", "metadata": "404",
    }  # fmt: skip
    if kind == "sync":  # the asynchronous client fails by itself when it is told to compress
        statuses["compressed"] = "415"
    assert {name: status for name, (status, _) in seen["errors"].items()} == statuses
    assert "there is no model 'resnet'" in seen["errors"]["model"][1]
