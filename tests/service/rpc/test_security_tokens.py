import asyncio
import contextlib
import hmac
import threading
from collections.abc import Iterator

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from service.client import ClassificationError, Client, Options
from service.errors import StartError
from service.generated.cifar.v1 import image_classifier_pb2 as messages
from service.generated.cifar.v1 import image_classifier_pb2_grpc as rpc
from service.generated.inference import open_inference_pb2 as inference
from service.generated.inference import open_inference_pb2_grpc as inference_rpc
from service.rpc.security import TokenInterceptor
from service.tokens import Tokens
from tests.service.exports import pictures

UNAUTHENTICATED = grpc.StatusCode.UNAUTHENTICATED
RELOADED = "tokens were read again: 1 are valid"
REFUSED = "the new tokens cannot be used"


def outcome(target: str, token: str | None = None) -> str:
    """OK, or the status of a call."""
    try:
        with Client(target, Options(timeout=20, attempts=2, token=token)) as client:
            answers = client.classify(pictures(2))
    except ClassificationError as error:
        return error.code.name
    assert len(answers) == 2
    return "OK"


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


@pytest.fixture
def token_file(tmp_path):
    path = tmp_path / "tokens"
    path.write_text("# two are valid\nfirst-secret\n\nsecond-secret\n")
    return path


def test_only_calls_with_a_valid_token_are_answered(start_server, linear, token_file):
    server = start_server(
        "--model", linear, "--token-file", token_file, "--metrics-port", "0", "--log-level", "debug"
    ).ready()
    assert outcome(server.target, "first-secret") == "OK"
    assert outcome(server.target, "second-secret") == "OK"
    for wrong in (None, "wrong", "first-secre", "first-secret2", "# two are valid", " "):
        assert outcome(server.target, wrong) == "UNAUTHENTICATED"
    with grpc.insecure_channel(server.target) as channel:
        # Every method, whatever its kind, and before the message is parsed.
        reflect = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo
        attempts = [
            lambda: next(rpc.ImageClassifierStub(channel).ClassifyStream(iter([messages.ClassifyRequest()]))),
            lambda: inference_rpc.GRPCInferenceServiceStub(channel).ServerLive(inference.ServerLiveRequest()),
            lambda: health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest()),
            lambda: next(health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())),
            lambda: next(reflect(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))),
            lambda: channel.unary_unary("/cifar.v1.ImageClassifier/Classify")(b"\xff\xff"),
            lambda: channel.unary_unary("/made.up/Method")(b""),
        ]
        for attempt in attempts:
            with pytest.raises(grpc.RpcError) as caught:
                attempt()
            assert caught.value.code() is UNAUTHENTICATED
            assert "authorization: Bearer TOKEN" in caught.value.details()
        listed = reflect(
            iter([reflection_pb2.ServerReflectionRequest(list_services="")]), metadata=bearer("first-secret")
        )
        assert any(
            service.name == "cifar.v1.ImageClassifier" for service in next(listed).list_services_response.service
        )
    metrics = server.metrics()
    assert (
        metrics['cifar_service_requests_total{code="UNAUTHENTICATED",method="cifar.v1.ImageClassifier/GetModel"}'] >= 6
    )
    assert metrics['cifar_service_requests_total{code="UNAUTHENTICATED",method="other"}'] >= 3
    assert server.stop() == 0
    assert "secret" not in server.log


def test_health_checks_need_no_token_if_the_option_says_so(start_server, linear, token_file):
    server = start_server("--model", linear, "--token-file", token_file, "--health-without-token").ready()
    with grpc.insecure_channel(server.target) as channel:
        status = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest()).status
        assert status == health_pb2.HealthCheckResponse.SERVING
        protocol = inference_rpc.GRPCInferenceServiceStub(channel)
        assert protocol.ServerLive(inference.ServerLiveRequest()).live
        assert protocol.ServerReady(inference.ServerReadyRequest()).ready
        assert protocol.ModelReady(inference.ModelReadyRequest(name="cifar10")).ready
        with pytest.raises(grpc.RpcError) as caught:
            protocol.ServerMetadata(inference.ServerMetadataRequest())
        assert caught.value.code() is UNAUTHENTICATED
    assert outcome(server.target) == "UNAUTHENTICATED"


def test_changed_tokens_are_read_again_and_a_lost_file_leaves_the_old_ones(start_server, linear, token_file):
    server = start_server("--model", linear, "--token-file", token_file).ready()
    token_file.write_text("third-secret\n")
    server.wait_for(RELOADED)
    assert outcome(server.target, "third-secret") == "OK"
    assert outcome(server.target, "first-secret") == "UNAUTHENTICATED"
    token_file.unlink()
    server.wait_for(REFUSED)
    assert outcome(server.target, "third-secret") == "OK"
    assert "secret" not in server.log


def test_a_token_file_that_is_a_dangling_link_for_a_while_is_read_when_its_target_exists(
    start_server, linear, token_file
):
    server = start_server("--model", linear, "--token-file", token_file).ready()
    token_file.unlink()
    token_file.symlink_to("renewed-tokens")
    server.wait_for(f"{REFUSED}.*No such file")
    assert outcome(server.target, "first-secret") == "OK"
    (token_file.parent / "renewed-tokens").write_text("third-secret\n")
    server.wait_for(RELOADED)
    assert outcome(server.target, "first-secret") == "UNAUTHENTICATED"
    assert server.log.count(REFUSED) == 1


# Revocation ends open streams


@contextlib.contextmanager
def open_requests() -> Iterator[Iterator[messages.ClassifyRequest]]:
    """A stream of one request that stays open until the end of the block."""
    end = threading.Event()

    def requests() -> Iterator[messages.ClassifyRequest]:
        yield messages.ClassifyRequest(packed_rgb=pictures(1).tobytes())
        end.wait(60)

    try:
        yield requests()
    finally:
        end.set()


def test_revoking_a_token_ends_its_streams_and_no_others(start_server, linear, token_file):
    server = start_server("--model", linear, "--token-file", token_file).ready()
    with grpc.insecure_channel(server.target) as channel, open_requests() as first, open_requests() as second:
        classifier = rpc.ImageClassifierStub(channel)
        health = health_pb2_grpc.HealthStub(channel)
        revoked = [
            classifier.ClassifyStream(first, metadata=bearer("first-secret"), timeout=60),
            health.Watch(health_pb2.HealthCheckRequest(), metadata=bearer("first-secret"), timeout=60),
        ]
        valid = classifier.ClassifyStream(second, metadata=bearer("second-secret"), timeout=60)
        for stream in (*revoked, valid):
            next(stream)
        token_file.write_text("second-secret\n")
        for stream in revoked:
            with pytest.raises(grpc.RpcError) as caught:
                next(stream)
            assert caught.value.code() is UNAUTHENTICATED
            assert "revoked" in caught.value.details()
        server.wait_for("running calls ended: 2")
        assert valid.is_active()
    assert server.stop() == 0
    assert "secret" not in server.log
    assert "Traceback" not in server.log


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr("service.watch.POLL_SECONDS", 0.02)
    monkeypatch.setattr("service.rpc.security._STATUS_SECONDS", 0.1)


def test_revoking_a_token_ends_the_call_of_a_client_that_reads_nothing(token_file, fast):
    async def test() -> None:
        tokens = Tokens(token_file)
        calls: asyncio.Queue[asyncio.Task[object] | None] = asyncio.Queue()

        async def endless(_requests: object, context: "grpc.aio.ServicerContext[bytes, bytes]") -> None:
            calls.put_nowait(asyncio.current_task())
            while True:
                await context.write(bytes(2**20))

        server = grpc.aio.server(interceptors=[TokenInterceptor(tokens, False, lambda method: None)])
        methods = {"Endless": grpc.stream_stream_rpc_method_handler(endless)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Test", methods),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        watching = asyncio.create_task(tokens.watch())
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            call = channel.stream_stream("/test.Test/Endless")(metadata=bearer("first-secret"))
            task = await calls.get()
            assert task
            token_file.write_text("second-secret\n")
            async with asyncio.timeout(10):
                await asyncio.wait([task])
            call.cancel()
        watching.cancel()
        await server.stop(0)

    asyncio.run(test())


# Which tokens are valid


@pytest.mark.parametrize(
    ("authorization", "allowed"),
    [
        ("Bearer first-secret", True),
        ("bearer second-secret", True),
        (b"Bearer first-secret", True),
        ("Basic first-secret", False),
        ("first-secret", False),
        ("Bearer", False),
        ("Bearer ", False),
        ("", False),
        (None, False),
        ("Bearer first-secret,second-secret", False),
    ],
)
def test_only_a_bearer_token_in_the_file_is_valid(token_file, authorization, allowed):
    assert (Tokens(token_file).find(authorization) is not None) is allowed


def test_a_file_without_tokens_is_refused(tmp_path):
    (tmp_path / "empty").write_text("# nothing\n\n")
    with pytest.raises(StartError, match="contains no token"):
        Tokens(tmp_path / "empty")


def test_every_token_is_compared_in_constant_time(token_file, monkeypatch):
    compared = []
    real = hmac.compare_digest
    monkeypatch.setattr("hmac.compare_digest", lambda a, b: compared.append(len(a) == len(b)) or real(a, b))
    Tokens(token_file).find("Bearer first-secret")
    assert compared == [True, True]  # both, although one matches, and always digests of the same length


def test_repr_shows_no_token(token_file):
    assert "secret" not in repr(Tokens(token_file)) + repr(vars(Tokens(token_file)))


def test_a_call_whose_token_was_revoked_a_moment_before_is_ended(token_file):
    async def test() -> None:
        tokens = Tokens(token_file)

        async def call(digest: bytes) -> None:
            with tokens.running(digest) as running:
                assert running.revoked
                await asyncio.sleep(10)

        with pytest.raises(asyncio.CancelledError):
            await asyncio.create_task(call(b"of a token that the file no longer holds"))
        assert not tokens._calls  # nothing is kept of calls that are over

    asyncio.run(test())
