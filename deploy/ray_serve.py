"""The classifier as an application of Ray Serve, for those who run a Ray cluster already.

    python deploy/ray_serve.py --port 50051            # on this machine, or on a cluster with --address
    serve deploy deploy/ray_serve.yaml                 # on a cluster, from its own configuration

Clients call the same services as without Ray, through the gRPC proxy of Ray Serve. Each replica has the engine, batches
and decode processes of one server process. Ray adds and removes replicas by the number of requests in progress, and
replaces those that fail. docs/deployment.md says what this costs. Ray's proxy listens at all addresses of the machine,
without TLS and tokens. Streams are not offered.
"""

import argparse
import importlib.metadata
import logging
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import grpc
import ray
from google.protobuf.empty_pb2 import Empty
from ray import serve
from ray.serve.config import gRPCOptions
from ray.serve.grpc_util import RayServegRPCContext

from service.assembly import assemble, start_decoder
from service.core.export_numbers import ExportNumbers
from service.core.metrics import Metrics
from service.errors import RequestError
from service.generated.cifar.v1 import image_classifier_pb2 as cifar
from service.generated.inference import open_inference_pb2 as inference
from service.rpc.calls import Call
from service.rpc.classify import ImageClassifier
from service.rpc.open_inference import OpenInference
from service.rpc.statuses import CODES, Failure, trailing_metadata
from service.settings import Settings, shipped_model
from service.starting import load_models

logger = logging.getLogger("ray.serve")  # goes to the log of the replica

APPLICATION = "cifar10"
# Ray announces only applications with an HTTP route to its proxies, also to the one for gRPC. HTTP requests to it fail.
ROUTE = "/cifar10"
SERVICER_FUNCTIONS = [
    "service.generated.cifar.v1.image_classifier_pb2_grpc.add_ImageClassifierServicer_to_server",
    "service.generated.inference.open_inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server",
]
# A replica is added when its share of the requests in progress is larger than this.
TARGET_ONGOING_REQUESTS = 8


class Classifier:
    """One replica: answers the unary methods of both services.

    Args:
        options: Options of the server by name, such as `model` and `variant`; see service.settings.
    """

    async def __init__(self, options: dict[str, Any]) -> None:  # type: ignore[misc] -- Ray awaits it
        settings = Settings(**options)
        self._max_batch_seconds = settings.max_batch_seconds
        metrics = Metrics()
        decoder = start_decoder(settings, metrics)  # its processes start while the model is loaded
        self._core = assemble(settings, metrics, decoder, load_models(settings, ExportNumbers(None)))
        self._servicers = (
            ImageClassifier(self._core.inference),
            OpenInference(self._core.inference, lambda: False, importlib.metadata.version("cifar-classifier")),
        )

    def check_health(self) -> None:
        """Ray calls this regularly, and replaces the replica if it raises an exception."""
        if self._core.batcher.running_seconds() > self._max_batch_seconds:
            raise RuntimeError("a batch has been computing for too long")

    async def answer(
        self,
        method: str,
        request: Any,  # noqa: ANN401 -- a message of the protocols
        context: RayServegRPCContext,
    ) -> Any:  # noqa: ANN401
        """The response to a request; a request that cannot be answered sets the status that the server would send."""
        (behaviour,) = (found for each in self._servicers if (found := getattr(each, method, None)))
        call = Call(method, context.peer(), None, request.ByteSize(), context)
        try:
            return await behaviour(request, call)
        except RequestError as error:
            failure = Failure(CODES[type(error)], error.message, error.retry_after)
        except Exception:
            logger.exception("%s failed", method)
            failure = Failure(grpc.StatusCode.INTERNAL, "the replica failed on this request; its log has the reason")
        # Nothing is raised, because Ray sends no trailing metadata, and so no hint when to retry, after an exception.
        context.set_code(failure.code)
        context.set_details(failure.message)
        context.set_trailing_metadata(list(trailing_metadata(failure)))
        return Empty()  # not sent: gRPC sends no message with such a status


def _unary(name: str) -> Callable[..., Awaitable[Any]]:
    async def method(self: Classifier, request: Any, grpc_context: RayServegRPCContext) -> Any:  # noqa: ANN401
        return await self.answer(name, request, grpc_context)

    return method


# Ray finds the method of a replica by the name of the method in the protocol.
for _service in (
    cifar.DESCRIPTOR.services_by_name["ImageClassifier"],
    inference.DESCRIPTOR.services_by_name["GRPCInferenceService"],
):
    for _method in _service.methods:
        if not _method.client_streaming:
            setattr(Classifier, _method.name, _unary(_method.name))


def build(arguments: dict[str, Any]) -> serve.Application:
    """The application; `import_path` of a configuration of Ray Serve.

    Args:
        arguments: `cpus`, the cores of each replica (1); `min_replicas` (1); `max_replicas` (8); and options of the
            server by name, such as `model` and `variant`.
    """
    options = dict(arguments)
    cpus = int(options.pop("cpus", 1))
    replicas = {"min_replicas": options.pop("min_replicas", 1), "max_replicas": options.pop("max_replicas", 8)}
    options = {"threads": cpus, "decode_processes": cpus, **options}
    deployment = serve.deployment(
        name="Classifier",
        # More would wait in the replica, which the proxy could give to another one.
        max_ongoing_requests=4 * TARGET_ONGOING_REQUESTS,
        autoscaling_config={**replicas, "target_ongoing_requests": TARGET_ONGOING_REQUESTS, "upscale_delay_s": 5},
        ray_actor_options={"num_cpus": cpus},
        graceful_shutdown_timeout_s=30,
    )(Classifier)
    return deployment.bind(options)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the application until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(description="Serves the classifier through Ray Serve.")
    parser.add_argument(
        "--address", default="local", help="address of a Ray cluster, or 'auto'; default: a new one on this machine"
    )
    parser.add_argument(
        "--port", type=int, default=50051, help="port of the gRPC proxy, at all addresses; default: %(default)s"
    )
    parser.add_argument(
        "--ray-http-port", type=int, default=8000, help="port of Ray's HTTP proxy, on loopback; default: %(default)s"
    )
    parser.add_argument(
        "--model", type=Path, default=shipped_model(), help="folder of the export; default: the shipped one"
    )
    parser.add_argument("--variant", default="fp32", help="variant of the model; default: %(default)s")
    parser.add_argument("--cpus", type=int, default=1, help="cores of each replica; default: %(default)s")
    parser.add_argument("--min-replicas", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--max-replicas", type=int, default=8, help="default: %(default)s")
    given = parser.parse_args(arguments)
    ray.init(address=given.address, include_dashboard=False)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)  # ray.init has set handlers that end the process at once
    names = ("variant", "cpus", "min_replicas", "max_replicas")
    options = {name: getattr(given, name) for name in names}
    start(given.port, given.ray_http_port)
    try:
        serve.run(build({"model": str(given.model.resolve()), **options}), name=APPLICATION, route_prefix=ROUTE)
        while True:
            signal.pause()
    finally:
        serve.delete(APPLICATION)  # waits for requests in progress; other applications of the cluster go on
        ray.shutdown()


def _stop(_number: int, _frame: object) -> NoReturn:
    sys.exit(0)


def start(port: int, http_port: int) -> None:
    """Starts the proxies of Ray Serve: for gRPC at all addresses of the machine, for Ray's own HTTP on loopback."""
    serve.start(
        http_options={"host": "127.0.0.1", "port": http_port},
        grpc_options=gRPCOptions(port=port, grpc_servicer_functions=SERVICER_FUNCTIONS),
    )


if __name__ == "__main__":
    main()
