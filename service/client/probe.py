"""Asks a server once for its health, as the health check of a container does.

    python -m service.probe [HOST:PORT]

Without HOST:PORT it asks the server of its own container: it reads the environment variables that configure that
server, trusts the server's own certificate file, and sends the first token of its token file.
"""

import argparse
import os
import socket
import ssl
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from pydantic_core import SchemaValidator, ValidationError, core_schema

from service.client.addresses import Addresses
from service.client.command import add_connection_options, options_of, token_of
from service.client.options import Options, channel_options
from service.environment import ENVIRONMENT_PREFIX
from service.ports import address

_EVERY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 -- nothing listens there: it is replaced
_PORT = SchemaValidator(core_schema.int_schema(ge=0, le=65535))


@dataclass(frozen=True)
class _Place:
    """A server to ask.

    Attributes:
        host: Name or IP address.
        port: Port.
        options: TLS, token and timeout.
        pinned: Whether `options.ca` is the server's own certificate, which need not name `host`.
    """

    host: str
    port: int
    options: Options
    pinned: bool = False

    @property
    def target(self) -> str:
        return address(self.host, self.port)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Returns:
        The exit code. 0: the server answers SERVING. 1: it answers something else or nothing, or a file is missing. 2:
        an option or a variable is wrong.
    """
    chosen = _parser().parse_args(arguments)
    name = chosen.target or "this machine's server"
    try:
        options = options_of(chosen)
        place = _named(chosen.target, options) if chosen.target else own_server(os.environ, options)
        name = place.target
        status = _status(place)
    except grpc.RpcError as error:
        print(f"{name}: {error.code().name}: {error.details()}", file=sys.stderr)
        return 1
    except OSError as error:  # also a certificate that is refused, whose error is a ValueError too
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    print(f"{name}: {status}")
    return 0 if status == "SERVING" else 1


def own_server(environment: Mapping[str, str], options: Options) -> _Place:
    """The server that these environment variables configure. Values that `options` sets take precedence.

    The server's own certificate serves as certificate authority. With mutual TLS, the client's certificate is that of
    CIFAR_PROBE_CERTIFICATE and CIFAR_PROBE_KEY, or else the server's own, which its client authority may not accept.

    Raises:
        OSError: The token file cannot be read.
        ValueError: A value is not valid.
    """
    # As service.command_line reads them, which imports all of pydantic: too much for a check every few seconds.
    variables = {name.upper(): value for name, value in environment.items()}

    def setting(name: str) -> str | None:
        value = variables.get(ENVIRONMENT_PREFIX + name)
        return None if value == "none" else value

    def path(name: str) -> Path | None:
        return Path(value) if (value := setting(name)) else None

    host = setting("HOST") or "127.0.0.1"
    certificate, key, token_file = path("TLS_CERT"), path("TLS_KEY"), path("TOKEN_FILE")
    pinned = certificate is not None and not options.ca and not options.tls
    if pinned:
        options = replace(options, ca=certificate)
    if setting("TLS_CLIENT_CA") and not options.certificate:
        options = replace(
            options,
            certificate=Path(environment.get("CIFAR_PROBE_CERTIFICATE", str(certificate))),
            key=Path(environment.get("CIFAR_PROBE_KEY", str(key))),
        )
    if token_file and not options.token:
        # The token does not leave this machine, because its server listens here.
        options = replace(options, token=token_of(token_file), allow_plaintext_token=True)
    return _Place(_EVERY_ADDRESS.get(host, host), _port(setting("PORT") or "50051"), options, pinned)


def _port(text: str) -> int:
    """A port as the server reads it, which takes 50051.0 too."""
    try:
        return int(_PORT.validate_python(text))
    except ValidationError:
        raise ValueError(f"{ENVIRONMENT_PREFIX}PORT is {text!r}, but must be a port, 0 to 65535") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m service.probe",
        description="Asks a server for its health once. Exit code 0: it answers SERVING.",
    )
    parser.add_argument(
        "target",
        nargs="?",
        metavar="HOST:PORT",
        help=f"default: the server on this machine that the environment variables {ENVIRONMENT_PREFIX}* configure",
    )
    add_connection_options(parser, timeout=2.0)
    return parser


def _named(target: str, options: Options) -> _Place:
    host, _, port = target.rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError("the address must be HOST:PORT")
    options.check_safe(Addresses.parse(target))
    return _Place(host, int(port), options)


def _status(place: _Place) -> str:
    """The name of the health status that the server answers."""
    credentials = place.options.credentials()
    options = channel_options(Addresses.parse(place.target), place.options.server_name)
    if place.pinned:
        options = (*options, ("grpc.ssl_target_name_override", _certificate_name(place)))
    if credentials is None:
        channel = grpc.insecure_channel(place.target, options)
    else:
        channel = grpc.secure_channel(place.target, credentials, options)
    with channel:
        health: Any = health_pb2_grpc.HealthStub(channel)  # its type has no methods
        answer = health.Check(
            health_pb2.HealthCheckRequest(), timeout=place.options.timeout, metadata=place.options.metadata
        )
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


def _certificate_name(place: _Place) -> str:
    """A host name that the server's certificate is valid for: gRPC always compares one and has no option against it.

    Raises:
        OSError: The server cannot be reached, or its certificate is not the one in the file.
        ValueError: The certificate names no host.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # the file need not hold the root that signed it
    context.set_alpn_protocols(["h2"])
    context.load_verify_locations(place.options.ca)
    if place.options.certificate:
        context.load_cert_chain(place.options.certificate, place.options.key)
    connection = socket.create_connection((place.host.strip("[]"), place.port), place.options.timeout)
    with connection, context.wrap_socket(connection) as secured:
        certificate: Any = secured.getpeercert()
    names = [name for kind, name in certificate.get("subjectAltName", ()) if kind in ("DNS", "IP Address")]
    names += [value for pairs in certificate["subject"] for key, value in pairs if key == "commonName"]
    if not names:
        raise ValueError(f"the certificate {place.options.ca} names no host")
    return str(names[0]).replace("*", "probe")
