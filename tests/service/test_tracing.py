"""Spans of requests, as an OpenTelemetry collector receives them from a real server."""

import io
import os
import secrets
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from PIL import Image

from service import tracing
from service.errors import StartError
from service.generated.cifar.v1 import image_classifier_pb2 as cifar
from service.generated.cifar.v1 import image_classifier_pb2_grpc as cifar_rpc
from service.generated.inference import open_inference_pb2 as messages
from service.generated.inference import open_inference_pb2_grpc as rpc
from tests.conftest import REPOSITORY
from tests.service.collector import Collector, Span, collect
from tests.service.conftest import DIRECTLY, Server, serving, until
from tests.service.exports import pictures, stalling

SERVER_KIND, ERROR = 2, 2  # of OTLP
PHASES = ["receive", "decode", "queue", "engine", "answer"]
CALLER = "00f067aa0ba902b7"


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with collect() as running:
        yield running


@pytest.fixture(scope="module")
def traced(linear: Path, collector: Collector) -> Iterator[Server]:
    environment = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{collector.target}",
        "OTEL_BSP_SCHEDULE_DELAY": "100",
        "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment=test",
    }
    with serving("--model", linear, "--http-port", "0", environment=environment) as server:
        yield server


@pytest.fixture
def channel(traced: Server) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(traced.target) as opened:
        yield opened


def caller(sampled: bool = True) -> tuple[str, list[tuple[str, str]]]:
    """A new trace, and the metadata that makes a request a child of its span CALLER."""
    trace = secrets.token_hex(16)
    return trace, [("traceparent", f"00-{trace}-{CALLER}-0{int(sampled)}")]


def png() -> bytes:
    file = io.BytesIO()
    Image.fromarray(pictures(1)[0]).save(file, "PNG")
    return file.getvalue()


def infer_request(pixels, identity: str = "") -> messages.ModelInferRequest:
    request = messages.ModelInferRequest(model_name="cifar10", id=identity, raw_input_contents=[pixels.tobytes()])
    request.inputs.add(name="images", datatype="UINT8", shape=pixels.shape)
    return request


def received(collector: Collector, trace: str, requests: int = 1) -> list[tuple[Span, list[Span]]]:
    """The spans of requests, each with its children, once they have arrived. Children are sent before their parents."""

    def parents() -> list[Span]:
        return [span for span in collector.spans(trace) if span.parent == CALLER]

    until(lambda: len(parents()) == requests)
    return [(span, [each for each in collector.spans(trace) if each.parent == span.identity]) for span in parents()]


def check_phases(request: Span, children: list[Span], names: list[str]) -> None:
    assert [span.name for span in children] == names
    assert request.kind == SERVER_KIND
    ends = [request.start]
    for span in children:
        assert ends[-1] <= span.start <= span.end <= request.end
        ends.append(span.end if span.name != "receive" else span.start)


def test_a_call_has_a_span_for_each_phase_under_the_callers_span(collector, channel):
    trace, metadata = caller()
    request = cifar.ClassifyRequest(images=[cifar.Image(encoded=png())] * 3, packed_rgb=pictures(2).tobytes())
    cifar_rpc.ImageClassifierStub(channel).Classify(request, metadata=metadata)
    [(span, children)] = received(collector, trace)
    assert span.name == "cifar.v1.ImageClassifier/Classify"
    check_phases(span, children, PHASES)
    assert span.attributes == {
        "rpc.system": "grpc", "rpc.service": "cifar.v1.ImageClassifier", "rpc.method": "Classify",
        "rpc.grpc.status_code": 0,
    }  # fmt: skip
    assert children[1].attributes == {"files": 3}
    assert children[3].attributes == {"images": 5}
    assert span.resource["service.name"] == "cifar-classifier"
    assert span.resource["deployment.environment"] == "test"


def test_a_call_of_the_open_inference_protocol_has_the_same_phases(collector, channel):
    trace, metadata = caller()
    rpc.GRPCInferenceServiceStub(channel).ModelInfer(infer_request(pictures(2)), metadata=metadata)
    [(span, children)] = received(collector, trace)
    assert span.name == "inference.GRPCInferenceService/ModelInfer"
    check_phases(span, children, PHASES)


def test_each_request_of_a_stream_has_a_span(collector, channel):
    trace, metadata = caller()
    requests = [infer_request(pictures(1)), infer_request(pictures(5000)[:1025]), infer_request(pictures(1))]
    list(rpc.GRPCInferenceServiceStub(channel).ModelStreamInfer(iter(requests), metadata=metadata))
    spans = received(collector, trace, requests=3)
    assert sorted(span.attributes["rpc.grpc.status_code"] for span, _ in spans) == [0, 0, 3]
    for span, children in spans:
        failed = span.attributes["rpc.grpc.status_code"] == 3
        check_phases(span, children, ["receive"] if failed else PHASES)


def http_status(request: urllib.request.Request) -> int:
    try:
        with DIRECTLY.open(request, timeout=60) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def test_a_request_over_http_is_a_child_of_the_span_in_its_header(collector, traced):
    port = traced.wait_for('"http_port"')["http_port"]
    for body, names, status in ((png(), PHASES, 200), (b"no image", ["receive", "decode"], 422)):
        trace, metadata = caller()
        request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/classify", body, dict(metadata))
        assert http_status(request) == status
        [(span, children)] = received(collector, trace)
        assert [child.name for child in children][: len(names)] == names
        assert span.kind == SERVER_KIND


def test_requests_over_http_without_images_have_no_spans(collector, traced):
    port = traced.wait_for('"http_port"')["http_port"]
    unseen = []
    for path in ("/healthz", "/v1/model", "/v2"):
        trace, metadata = caller()
        assert http_status(urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers=dict(metadata))) == 200
        unseen.append(trace)
    trace, metadata = caller()
    assert http_status(urllib.request.Request(f"http://127.0.0.1:{port}/v1/classify", png(), dict(metadata))) == 200
    received(collector, trace)  # spans are sent in their order
    assert [collector.spans(each) for each in unseen] == [[], [], []]


def test_a_failure_of_the_server_is_an_error_and_a_mistake_of_the_client_is_not(collector, channel):
    for pixels, code, is_error in ((stalling(1), 13, True), (pictures(1025), 3, False)):
        trace, metadata = caller()
        with pytest.raises(grpc.RpcError):
            rpc.GRPCInferenceServiceStub(channel).ModelInfer(infer_request(pixels), metadata=metadata)
        [(span, _)] = received(collector, trace)
        assert span.attributes["rpc.grpc.status_code"] == code
        assert (span.status == ERROR) is is_error


def test_a_caller_that_does_not_record_gets_no_spans_and_calls_without_images_have_none(collector, channel):
    ignored, metadata = caller(sampled=False)
    rpc.GRPCInferenceServiceStub(channel).ModelInfer(infer_request(pictures(1)), metadata=metadata)
    live, metadata = caller()
    rpc.GRPCInferenceServiceStub(channel).ServerLive(messages.ServerLiveRequest(), metadata=metadata)
    trace, metadata = caller()
    rpc.GRPCInferenceServiceStub(channel).ModelInfer(infer_request(pictures(1)), metadata=metadata)
    received(collector, trace)  # spans are sent in their order
    assert collector.spans(ignored) == collector.spans(live) == []


def test_malformed_headers_of_tracing_are_ignored_without_a_line_in_the_log(start_server, linear, collector, tmp_path):
    (tmp_path / "tokens").write_text("secret")
    options = ("--model", linear, "--http-port", "0", "--token-file", tmp_path / "tokens")
    server = start_server(*options, environment={"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{collector.target}"}).ready()
    parent = {"traceparent": f"00-{'1' * 32}-{CALLER}-01"}
    for headers in (
        {"baggage": "=,;," * 2000 + "password=hunter2 x"},
        {"traceparent": "hunter2" * 1000},
        {**parent, "tracestate": "hunter2 x,hunter2=,=" * 20},
        {**parent, "tracestate": "hunter2=1," * 1000},
    ):
        for token, status in (("wrong", 401), ("secret", 200)):
            authorized = {**headers, "Authorization": f"Bearer {token}"}
            assert http_status(urllib.request.Request(f"{server.http_url}/v1/model", headers=authorized)) == status
    assert server.stop() == 0
    assert not [line for line in server.lines if "hunter2" in line or '"WARNING"' in line]


def test_the_last_spans_are_sent_before_the_server_ends(start_server, linear):
    with collect() as collector:
        server = start_server(
            "--model", linear,
            environment={
                "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"http://{collector.target}",
                "OTEL_SERVICE_NAME": "mine",
                "OTEL_BSP_SCHEDULE_DELAY": "3600000",
            },
        ).ready()  # fmt: skip
        trace, metadata = caller()
        with grpc.insecure_channel(server.target) as opened:
            rpc.GRPCInferenceServiceStub(opened).ModelInfer(infer_request(pictures(1)), metadata=metadata)
        assert len(collector) == 0
        assert server.stop() == 0
        [(span, _)] = received(collector, trace)
        assert span.resource["service.name"] == "mine"


def test_a_collector_that_cannot_be_reached_fails_no_request_and_hardly_delays_the_end(start_server, linear):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens
        endpoint = f"http://127.0.0.1:{taken.getsockname()[1]}"
        server = start_server("--model", linear, environment={"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint}).ready()
        with grpc.insecure_channel(server.target) as opened:
            for _ in range(20):
                rpc.GRPCInferenceServiceStub(opened).ModelInfer(infer_request(pictures(1)))
        assert server.stop(seconds=15) == 0


# Off, or not installed

# Python runs this when it starts. A file and no fixture, because it concerns the workers too.
HIDE = """
import sys

class Hide:
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] == "opentelemetry":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hide())
"""


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_server_that_should_trace_without_the_packages_does_not_start_and_names_the_extra(linear, tmp_path, workers):
    (tmp_path / "sitecustomize.py").write_text(HIDE)
    done = subprocess.run(
        [sys.executable, "-m", "service", "--port", "0", "--model", linear, "--workers", workers],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4317"},
    )  # fmt: skip
    assert done.returncode == 2
    assert "OTEL_EXPORTER_OTLP_ENDPOINT asks for tracing, which needs the extra 'tracing'" in done.stderr


def test_without_an_exporter_nothing_of_opentelemetry_is_imported():
    code = (
        "import sys, service.server; from service import tracing; "
        "assert tracing.start({}, '1') is None; "
        "assert not [name for name in sys.modules if name.startswith('opentelemetry')]"
    )
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True, timeout=60)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"OTEL_SERVICE_NAME": "x"},
        {"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4317"},
        {"OTEL_SDK_DISABLED": "True", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4317"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": ""},
    ],
)
def test_tracing_is_off_unless_the_environment_names_an_exporter(environment):
    assert tracing.start(environment, "1") is None
    assert tracing.current() is None


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"OTEL_TRACES_EXPORTER": "jaeger"}, "the exporter 'jaeger' is not installed"),
        (
            {"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "smoke"},
            "OTEL_EXPORTER_OTLP_PROTOCOL is 'smoke'; it must be one of: grpc, http/protobuf",
        ),
    ],
)
def test_an_exporter_that_does_not_exist_is_named(environment, message):
    with pytest.raises(StartError, match=message):
        tracing.start(environment, "1")


@pytest.mark.parametrize(
    ("workers", "variable", "value", "reason"),
    [
        ("1", "OTEL_PROPAGATORS", "spoken", "Propagator spoken not found"),
        ("2", "OTEL_PROPAGATORS", "spoken", "Propagator spoken not found"),
        ("1", "OTEL_EXPORTER_OTLP_COMPRESSION", "hot", 'Invalid value "hot"'),
        ("1", "OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT", "many", "must be a non-negative integer but got many"),
    ],
)
def test_a_server_whose_variables_of_tracing_cannot_be_used_does_not_start(linear, workers, variable, value, reason):
    ended = subprocess.run(
        [sys.executable, "-m", "service", "--port", "0", "--model", linear, "--workers", workers],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=120,
        env=os.environ | {"OTEL_TRACES_EXPORTER": "otlp", variable: value},
    )  # fmt: skip
    assert ended.returncode == 2
    assert [line for line in ended.stderr.splitlines() if reason in line and line.startswith("error: ")]
    assert "Traceback" not in ended.stderr
