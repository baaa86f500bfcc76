"""What NVIDIA's own client does with a server; prints JSON. A program of its own: its messages bear the names of ours.

Arguments: HOST:PORT, and a file with the descriptor of our protocol.
"""

import json
import queue
import sys
from pathlib import Path

import numpy as np
import tritonclient.grpc as triton
from google.protobuf import descriptor_pb2, descriptor_pool
from tritonclient.grpc import model_config_pb2, service_pb2
from tritonclient.utils import InferenceServerException

from tests.service.exports import expected, pictures


def main(target: str) -> dict[str, object]:
    client = triton.InferenceServerClient(target)
    seen: dict[str, object] = {
        "live": client.is_server_live(),
        "ready": client.is_server_ready(),
        "model_ready": client.is_model_ready("cifar10"),
        "other_model_ready": client.is_model_ready("resnet"),
        "server": client.get_server_metadata(as_json=True),
        "model": client.get_model_metadata("cifar10", as_json=True),
        "config": client.get_model_config("cifar10", as_json=True),
    }
    images = pictures(5)
    given = triton.InferInput("images", list(images.shape), "UINT8")
    given.set_data_from_numpy(images)

    result = client.infer("cifar10", [given], request_id="mine")
    seen["sync"] = float(np.abs(result.as_numpy("probabilities") - expected(0, images)).max())
    seen["both"] = [output.name for output in result.get_response().outputs]
    seen["id"] = result.get_response().id

    chosen = [triton.InferRequestedOutput("probabilities")]
    answers: queue.Queue[object] = queue.Queue()
    for _ in range(20):
        client.async_infer("cifar10", [given], lambda result, error: answers.put(error or result), outputs=chosen)
    differences = []
    for _ in range(20):
        answer = answers.get(timeout=30)
        if isinstance(answer, Exception):
            raise answer
        differences.append(float(np.abs(answer.as_numpy("probabilities") - expected(0, images)).max()))
    seen["async"] = max(differences)

    ranked = client.infer("cifar10", [given], outputs=[triton.InferRequestedOutput("probabilities", class_count=2)])
    seen["classification"] = [[text.decode() for text in row] for row in ranked.as_numpy("probabilities")]

    seen["errors"] = errors(client, given)
    seen["streamed"] = streamed(client, given, chosen)
    statistics = client.get_inference_statistics("cifar10", as_json=True)
    seen["statistics"] = statistics["model_stats"][0]
    seen["differing_fields"] = differing_fields()
    return seen


def streamed(client, given, chosen) -> list[list[str]]:
    """For each of four requests of a stream the id in its answer, and whether the answer is wrong. One is too large."""
    answers: queue.Queue[tuple[object, object]] = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    large = triton.InferInput("images", [401, 32, 32, 3], "UINT8")
    large.set_data_from_numpy(pictures(401))
    for number, images in enumerate((given, large, given, given)):
        client.async_stream_infer("cifar10", [images], outputs=chosen, request_id=str(number))
    seen = []
    for number in range(4):
        result, error = answers.get(timeout=30)
        if error is None:
            difference = np.abs(result.as_numpy("probabilities") - expected(0, pictures(5))).max()
            seen.append([result.get_response().id, "wrong" if difference > 1e-5 else ""])
        else:  # this version of the client hands over the message without the id
            seen.append([str(number), "wrong" if "at most 400" in error.message() else str(error)])
    client.stop_stream()
    return seen


def errors(client: triton.InferenceServerClient, given: triton.InferInput) -> dict[str, str]:
    """Status of each thing that a client can get wrong."""
    wrong_type = triton.InferInput("images", [1, 32, 32, 3], "FP32")
    wrong_type.set_data_from_numpy(np.zeros((1, 32, 32, 3), np.float32))
    wrong_shape = triton.InferInput("images", [1, 3, 32, 32], "UINT8")
    wrong_shape.set_data_from_numpy(np.zeros((1, 3, 32, 32), np.uint8))
    wrong_name = triton.InferInput("image", [1, 32, 32, 3], "UINT8")
    wrong_name.set_data_from_numpy(np.zeros((1, 32, 32, 3), np.uint8))
    attempts = {
        "model": lambda: client.infer("resnet", [given]),
        "version": lambda: client.infer("cifar10", [given], model_version="7"),
        "type": lambda: client.infer("cifar10", [wrong_type]),
        "shape": lambda: client.infer("cifar10", [wrong_shape]),
        "name": lambda: client.infer("cifar10", [wrong_name]),
        "output": lambda: client.infer("cifar10", [given], outputs=[triton.InferRequestedOutput("labels")]),
        "sequence": lambda: client.infer("cifar10", [given], sequence_id=7, sequence_start=True),
        "metadata": lambda: client.get_model_metadata("resnet"),
        "load": lambda: client.load_model("cifar10"),
    }
    statuses = {}
    for name, attempt in attempts.items():
        try:
            attempt()
        except InferenceServerException as error:
            statuses[name] = error.status()
        else:
            statuses[name] = "none"
    return statuses


def differing_fields() -> list[str]:
    """Fields of our messages that are not, with number and type, in theirs."""
    ours = descriptor_pb2.FileDescriptorProto.FromString(Path(sys.argv[2]).read_bytes())
    pool = descriptor_pool.DescriptorPool()
    file = pool.Add(ours) or pool.FindFileByName(ours.name)
    differing = []

    def compare(mine, theirs) -> None:
        for field in mine.fields:
            if field.full_name == "inference.ModelMetadataResponse.parameters":
                continue  # as in MLServer; Triton's clients ignore it
            other = theirs.fields_by_name.get(field.name)
            same = other is not None and (field.number, field.type, field.is_repeated, name(field)) == (
                other.number, other.type, other.is_repeated, name(other),
            )  # fmt: skip
            if not same:
                differing.append(field.full_name)
        for nested in mine.nested_types:
            if nested.full_name == "inference.ModelMetadataResponse.ParametersEntry":
                continue
            compare(nested, theirs.nested_types_by_name[nested.name])

    def name(field) -> str:
        kind = field.message_type or field.enum_type
        return kind.full_name if kind else ""

    for message_name, message in file.message_types_by_name.items():
        module = service_pb2 if message_name in service_pb2.DESCRIPTOR.message_types_by_name else model_config_pb2
        compare(message, module.DESCRIPTOR.message_types_by_name[message_name])
    types = file.enum_types_by_name["DataType"].values
    differing += [value.name for value in types if model_config_pb2.DataType.Value(value.name) != value.number]
    methods = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods_by_name
    for method in file.services_by_name["GRPCInferenceService"].methods:
        theirs = methods.get(method.name)
        if theirs is None or theirs.input_type.full_name != method.input_type.full_name:
            differing.append(method.full_name)
    return differing


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))
