"""Every option of the server, once: flag, variable, default, meaning; `python -m service --help` tells them.

Must never know what the options do: the rooms are given values, not this class.
"""

import os
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from service.errors import StartError
from service.ports import is_loopback

ENVIRONMENT_PREFIX = "CIFAR_SERVICE_"
MIB = 2**20

Port = Annotated[int, Field(ge=0, le=65535)]


def shipped(name: str) -> Path:
    """A folder that came with the package: inside it where it was installed, beside it in a checkout."""
    package = Path(__file__).parent
    installed = package / name
    return installed if installed.is_dir() else package.parent / name


def shipped_model() -> Path:
    """The export that came with the package."""
    return shipped("exported")


class Settings(BaseSettings):
    """Classifies batches of images over gRPC.

    Each option is also an environment variable: --max-batch-size is CIFAR_SERVICE_MAX_BATCH_SIZE. A flag wins.
    """

    model_config = SettingsConfigDict(
        env_prefix=ENVIRONMENT_PREFIX,
        cli_prog_name="python -m service",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_exit_on_error=False,
        cli_hide_none_type=True,
        cli_avoid_json=True,
        env_parse_none_str="none",
        extra="forbid",
        frozen=True,
    )

    # Where it listens
    host: str = Field("127.0.0.1", description="address to listen on; other than loopback needs TLS or --insecure")
    port: Port = Field(50051, description="port to listen on; 0: a free one, named in the log")
    workers: PositiveInt = Field(1, description="processes that share the port, under a supervisor that replaces them")
    grace: NonNegativeFloat = Field(30.0, description="seconds that requests in flight have to finish after SIGTERM")

    # What it serves
    model: Path = Field(
        default_factory=shipped_model,
        description="folder of an export, with manifest.json; left out: the model that came with the package",
    )
    variant: str = Field("fp32", description="which of the manifest's variants to serve")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto: CUDA where onnxruntime has it; says which"
    )
    threads: NonNegativeInt = Field(0, description="of onnxruntime in each process; 0: the cores, divided by --workers")

    # How requests wait
    max_batch_size: PositiveInt = Field(32, description="images that are computed at once")
    max_queue_delay_ms: NonNegativeFloat = Field(
        0.0, description="how long an idle engine may wait for a batch to fill, in milliseconds"
    )
    max_queued_images: PositiveInt = Field(
        4096, description="images in the server at once; beyond it requests get RESOURCE_EXHAUSTED"
    )
    max_queued_bytes: PositiveInt = Field(256 * MIB, description="bytes of images in the server at once; likewise")

    # What a request may hold
    max_images: PositiveInt = Field(1024, description="images in one request")
    max_message_bytes: PositiveInt = Field(16 * MIB, description="bytes of one message")
    max_image_bytes: PositiveInt = Field(10 * MIB, description="bytes of one encoded image")
    max_image_pixels: PositiveInt = Field(32_000_000, description="pixels of one encoded image, before it is decoded")
    decode_threads: NonNegativeInt = Field(0, description="that decode images; 0: the cores, divided by --workers")

    # Who may ask
    tls_cert: Path | None = Field(None, description="PEM file of the server's certificate chain; turns TLS on")
    tls_key: Path | None = Field(None, description="PEM file of its private key")
    tls_client_ca: Path | None = Field(
        None, description="PEM file of who signs clients' certificates; turns mutual TLS on"
    )
    token_file: Path | None = Field(
        None, description="file of bearer tokens, one a line, any of which is valid; read again when it changes"
    )
    health_without_token: bool = Field(False, description="answer health checks without a token")
    insecure: bool = Field(False, description="allow plaintext on addresses other than loopback")

    # What it tells
    metrics_port: Port | None = Field(None, description="serve Prometheus metrics over HTTP on this port")
    metrics_host: str = Field("127.0.0.1", description="address of the metrics")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="debug: a line for each request"
    )
    log_format: Literal["human", "json"] = Field("human", description="of the log, on standard error")

    @model_validator(mode="after")
    def _options_agree(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("--tls-cert and --tls-key go together: give both, or neither")
        if self.tls_client_ca and not self.tls_cert:
            raise ValueError("--tls-client-ca needs --tls-cert and --tls-key")
        if self.max_images > self.max_queued_images:
            raise ValueError(
                f"--max-images {self.max_images} is more than --max-queued-images {self.max_queued_images}, "
                "so that the largest requests would always be refused"
            )
        if self.max_message_bytes > self.max_queued_bytes:
            raise ValueError(
                "--max-message-bytes is more than --max-queued-bytes: the largest requests would be refused"
            )
        if not self.tls_cert and not self.insecure and not is_loopback(self.host):
            raise ValueError(
                f"--host {self.host} is not loopback and there is no TLS: give --tls-cert and --tls-key, "
                "or --insecure to send images and tokens in the clear"
            )
        return self

    @property
    def engine_threads(self) -> int:
        """Threads of one process' onnxruntime."""
        return self.threads or self._share_of_cores()

    @property
    def decoder_threads(self) -> int:
        """Threads of one process that decode images."""
        return self.decode_threads or self._share_of_cores()

    def _share_of_cores(self) -> int:
        return max(1, len(os.sched_getaffinity(0)) // self.workers)


def parse(arguments: list[str]) -> Settings:
    """Settings from flags and environment.

    Raises:
        StartError: An option is unknown or its value is not allowed; one line that names it.
        SystemExit: 0, after --help.
    """
    try:
        return Settings(_cli_parse_args=arguments)  # type: ignore[call-arg]
    except ValidationError as error:
        raise StartError("; ".join(_told(problem, arguments) for problem in error.errors())) from error
    except SettingsError as error:
        raise StartError(f"{' '.join(str(error).split())} (see python -m service --help)") from error


def _told(problem: ErrorDetails, arguments: list[str]) -> str:
    message = problem["msg"].removeprefix("Value error, ")
    if not problem["loc"]:
        return message
    name = str(problem["loc"][0])
    option, variable = f"--{name.replace('_', '-')}", (ENVIRONMENT_PREFIX + name).upper()
    given = any(argument.split("=")[0] == option for argument in arguments)
    source = f" (from {variable})" if variable in os.environ and not given else ""
    return f"{option} {problem['input']}{source}: {message}"
