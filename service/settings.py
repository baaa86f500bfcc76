"""Every option of the server: its flag, environment variable, default and help text. See `python -m service --help`.

Modules receive the values that they need, not this class.
"""

import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails

from cifar_core.errors import program_name
from service.command_line import UsageError, from_environment, from_flags
from service.cpu_quota import usable_cpus
from service.environment import ENVIRONMENT_PREFIX
from service.errors import StartError
from service.logs import escape
from service.ports import is_loopback

_PROGRAM = program_name("service")
MIB = 2**20
# gRPC's options are 32-bit numbers.
INT32_MAX = 2**31 - 1


def _check_host(host: str) -> str:
    # A variable or an argument that is not UTF-8 contains surrogates, which no message can hold.
    if not host.isprintable():
        raise ValueError(f"{host!a} is neither a name nor an address")
    return host


def _check_model_name(name: str) -> str:
    if name == "stats":
        raise ValueError("/v2/models/stats is the path of the statistics of all models: choose another name")
    return name


Port = Annotated[int, Field(ge=0, le=65535)]
# Part of URLs.
ModelName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"), AfterValidator(_check_model_name)]
Int32 = Annotated[int, Field(ge=1, le=INT32_MAX)]
Host = Annotated[str, AfterValidator(_check_host)]
Threads = Annotated[int, Field(ge=0, le=1024)]
Delay = Annotated[float, Field(ge=0, le=60_000)]
Grace = Annotated[float, Field(ge=0, le=INT32_MAX / 1000)]
Seconds = Annotated[float, Field(gt=0, le=INT32_MAX / 1000)]  # gRPC counts them in milliseconds


def shipped(name: str) -> Path:
    """A folder that comes with the package: inside the package if it is installed, next to it in a checkout."""
    package = Path(__file__).parent
    installed = package / name
    return installed if installed.is_dir() else package.parent / name


def shipped_model() -> Path:
    """The export that comes with the package."""
    return shipped("exported")


class Settings(BaseModel):
    """Classifies batches of images over gRPC.

    Each option is also an environment variable: --max-batch-size is CIFAR_SERVICE_MAX_BATCH_SIZE. A flag takes
    precedence.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    # Address and processes
    host: Host = Field("127.0.0.1", description="address to listen on; one other than loopback needs TLS or --insecure")
    port: Port = Field(50051, description="port to listen on; 0 picks a free port and logs it")
    http_port: Port | None = Field(
        None,
        description="port for HTTP (REST, and a page to try the model); needs the extra http; 0 picks a free port and "
        "logs it",
    )
    http_host: Host | None = Field(None, description="address to listen on for HTTP; default: that of --host")
    workers: PositiveInt = Field(
        1, description="number of server processes that share the port; a supervisor replaces those that fail"
    )
    grace: Grace = Field(
        30.0, description="seconds after SIGTERM within which accepted requests must finish and be answered"
    )

    # Model
    model: Path = Field(shipped("exported"), description="folder of the export to serve (with manifest.json)")
    model_name: ModelName = Field(
        "cifar10", description="name by which clients of the Open Inference Protocol address the model"
    )
    variant: str = Field("fp32", description="variant of the model to serve: fp32 or int8; also bf16 with openvino")
    device: Literal["auto", "cpu", "cuda", "openvino"] = Field(
        "auto",
        description="where to compute; auto uses CUDA if onnxruntime supports it and logs its choice; openvino is the "
        "CPU with OpenVINO, for variants that were measured with it",
    )
    threads: Threads = Field(
        0, description="number of onnxruntime threads in each process; 0: the available cores divided by --workers"
    )
    max_batch_seconds: Seconds = Field(
        30.0, description="seconds that one batch may compute; a process that exceeds them ends, so that it is replaced"
    )

    # Queue
    max_batch_size: Int32 = Field(32, description="largest number of images computed at once")
    max_queue_delay_ms: Delay = Field(
        0.0, description="milliseconds that an idle engine may wait for a batch to fill, at most 60000"
    )
    max_queued_images: PositiveInt = Field(
        4096,
        description="largest number of images that each process holds at once; further requests get RESOURCE_EXHAUSTED",
    )
    max_queued_bytes: PositiveInt = Field(
        256 * MIB, description="largest number of bytes of requests that each process holds at once"
    )

    # Requests
    max_images: PositiveInt = Field(1024, description="largest number of images in a request")
    max_message_bytes: Int32 = Field(8 * MIB, description="largest size of a request message, in bytes")
    max_image_bytes: Int32 = Field(8_000_000, description="largest size of an encoded image, in bytes")
    max_image_pixels: Int32 = Field(
        32_000_000, description="largest number of pixels of an encoded image (width times height)"
    )
    decode_processes: Threads = Field(
        0, description="number of processes that decode images; 0: the available cores divided by --workers"
    )
    max_decode_seconds: Seconds = Field(
        1.0, description="seconds of CPU time that decoding one image may take; an image that needs more is rejected"
    )

    # Connections
    max_connections: Int32 = Field(1000, description="largest number of open connections of each process")
    max_concurrent_streams: Int32 = Field(
        512,
        description="largest number of calls in progress on one connection; clients should use at most half of it",
    )
    max_connection_age: Seconds = Field(
        3600.0,
        description="seconds after which a client must reconnect and present its certificate and token again",
    )
    receive_timeout: Seconds = Field(
        5.0, description="seconds within which a request message must arrive once the server starts to read it"
    )
    max_receiving_bytes: PositiveInt = Field(
        192 * MIB, description="largest number of bytes of messages that each process receives at the same time"
    )

    # Security
    tls_cert: Path | None = Field(None, description="PEM file with the server's certificate chain; turns on TLS")
    tls_key: Path | None = Field(None, description="PEM file with the private key of --tls-cert")
    tls_client_ca: Path | None = Field(
        None, description="PEM file with the authority that signs client certificates; turns on mutual TLS"
    )
    token_file: Path | None = Field(
        None, description="file with bearer tokens, one per line; each call needs one; a changed file is read again"
    )
    health_without_token: bool = Field(False, description="answer health checks without a token")
    insecure: bool = Field(False, description="allow unencrypted traffic on addresses other than loopback")

    # Observation
    metrics_port: Port | None = Field(None, description="port for Prometheus metrics over HTTP; 0 picks a free port")
    metrics_host: Host = Field(
        "127.0.0.1", description="address for the metrics; one other than loopback needs --insecure"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="lowest level to log; debug logs a line per request"
    )
    log_format: Literal["human", "json"] = Field("human", description="format of the log, on standard error")

    def __init__(self, **values: Any) -> None:  # noqa: ANN401 -- pydantic checks them
        super().__init__(**{**from_environment(type(self), ENVIRONMENT_PREFIX), **values})

    @model_validator(mode="after")
    def _options_agree(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("--tls-cert and --tls-key belong together: give both or neither")
        if self.tls_client_ca and not self.tls_cert:
            raise ValueError("--tls-client-ca needs --tls-cert and --tls-key")
        if self.max_images > self.max_queued_images:
            raise ValueError(
                f"--max-images {self.max_images} is more than --max-queued-images {self.max_queued_images}: "
                "the largest requests would always be refused"
            )
        for name, value in (
            ("--max-queued-bytes", self.max_queued_bytes),
            ("--max-receiving-bytes", self.max_receiving_bytes),
        ):
            if self.max_message_bytes > value:
                raise ValueError(
                    f"--max-message-bytes {self.max_message_bytes} is more than {name} {value}: "
                    "the largest requests would always be refused"
                )
        for option, host in (("--host", self.host), ("--http-host", self.http_host)):
            if host is not None and not self.tls_cert and not self.insecure and not is_loopback(host):
                raise ValueError(
                    f"{option} {host} is not a loopback address and TLS is off: give --tls-cert and --tls-key, "
                    "or --insecure to send images and tokens unencrypted"
                )
        if self.metrics_port is not None and not self.insecure and not is_loopback(self.metrics_host):
            raise ValueError(
                f"--metrics-host {self.metrics_host} is not a loopback address and metrics are not encrypted: "
                "give --insecure to allow that"
            )
        return self

    @property
    def http_address(self) -> str:
        """Name or address to listen on for HTTP."""
        return self.host if self.http_host is None else self.http_host

    @property
    def engine_threads(self) -> int:
        """Number of onnxruntime threads of one process."""
        return self.threads or self._share_of_cpus()

    @property
    def decoder_processes(self) -> int:
        """Number of decoding processes of one server process."""
        return self.decode_processes or self._share_of_cpus()

    def _share_of_cpus(self) -> int:
        return max(1, usable_cpus() // self.workers)

    @property
    def receiving_slots(self) -> int:
        """Number of messages that may be received at once."""
        return max(1, self.max_receiving_bytes // self.max_message_bytes)


# How KServe spells an option that it passes to every model server.
_SPELLINGS = {"--model_name": "--model-name"}


def parse(arguments: list[str]) -> Settings:
    """The settings from flags and environment variables.

    Raises:
        StartError: An option is unknown or its value is not allowed. The message is one line and names the option.
        SystemExit: 0, after --help.
    """
    arguments = [_respell(argument) for argument in arguments]
    try:
        settings = Settings(**from_flags(Settings, _PROGRAM, arguments))
    except ValidationError as error:
        raise StartError("; ".join(_describe(problem, arguments) for problem in error.errors())) from error
    except UsageError as error:
        raise StartError(f"error parsing CLI: {' '.join(str(error).split())} (see {_PROGRAM} --help)") from error
    _check_ports(settings)
    return settings


def _check_ports(settings: Settings) -> None:
    """Refuses one port for two purposes.

    This is no rule of Settings itself: free ports that the system chose for a worker, on different hosts, may be equal.
    """
    options: dict[int, str] = {}
    for option, port in (
        ("--port", settings.port),
        ("--http-port", settings.http_port),
        ("--metrics-port", settings.metrics_port),
    ):
        if port and (other := options.setdefault(port, option)) != option:
            raise StartError(f"{other} and {option} are both {port}: give each a port of its own, or 0 for a free one")


def _respell(argument: str) -> str:
    option, equals, value = argument.partition("=")
    return _SPELLINGS.get(option, option) + equals + value


def _describe(problem: ErrorDetails, arguments: list[str]) -> str:
    message = problem["msg"].removeprefix("Value error, ")
    if not problem["loc"]:
        return message
    name = str(problem["loc"][0])
    option, variable = f"--{name.replace('_', '-')}", (ENVIRONMENT_PREFIX + name).upper()
    given = any(argument.split("=")[0] == option for argument in arguments)
    source = f" (from {variable})" if variable in os.environ and not given else ""
    return f"{option} {escape(str(problem['input']))}{source}: {message}"
