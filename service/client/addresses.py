"""Where the servers are: one address, several addresses, or a DNS name that has an address for each server."""

import ipaddress
import re
from dataclasses import dataclass
from typing import Self

from service.ports import is_loopback

_FORMS = "write HOST:PORT, or IP:PORT,IP:PORT,…, or dns:///NAME:PORT for all addresses of a name"
_MAX_PORT = 65535
# The schemes of gRPC: those whose addresses end with HOST:PORT, and those whose addresses have no port.
_LISTS = ("ipv4:", "ipv6:")
_SOCKETS = ("unix:", "unix-abstract:")
_WITHOUT_PORT = (*_SOCKETS, "vsock:", "xds:", "google-c2p:")
# gRPC drops what follows the first two of these, and would call another host than the one that is read here.
_NOT_IN_ADDRESSES = re.compile(r"[?#\s]")


@dataclass(frozen=True)
class Addresses:
    """The servers that one client calls in turn.

    Attributes:
        target: The same in the form that gRPC expects.
        hosts: Names or IP addresses of the servers, without ports; the whole target if it names none.
        authority: HOST:PORT that requests name as their server, if gRPC's own choice would not be one.
        all_loopback: Whether all servers run on this machine.
        is_one_server: Whether there is certainly one server: a name may have several addresses.
    """

    target: str
    hosts: tuple[str, ...]
    authority: str | None = None
    all_loopback: bool = False
    is_one_server: bool = False

    @classmethod
    def parse(cls, target: str) -> Self:
        """Reads HOST:PORT, IP:PORT,IP:PORT,… or a URI that gRPC knows, such as dns:///NAME:PORT.

        Raises:
            ValueError: The address is empty or has none of these forms, a port is not one from 1 to 65535, one of
                several addresses is not an IP address with a port, or IPv4 and IPv6 are mixed.
        """
        if not target.strip():
            raise ValueError(f"the address of the server is empty: {_FORMS}")
        if target.startswith(_WITHOUT_PORT):
            return cls._without_port(target)
        if target.startswith(_LISTS):
            addresses = cls._of_list(target.partition(":")[2].split(","))
            if addresses.target != target:
                raise ValueError(f"the addresses in {target!r} are not of this kind: {_FORMS}")
            return addresses
        if "," in target:
            return cls._of_list([each.strip() for each in target.split(",")])
        place, resolver = target, ""
        if target.startswith("dns:"):
            place = target.removeprefix("dns:")
            if place.startswith("//"):  # dns://SERVER/NAME:PORT; the server may be left out
                resolver, slash, place = place.removeprefix("//").partition("/")
                if not slash:
                    raise ValueError(f"{target!r} names no server after dns://: {_FORMS}")
        host = _host_with_port(target, place)
        # Another DNS server may say where any name is.
        all_loopback = not resolver and is_loopback(host)
        return cls(target, (host,), all_loopback=all_loopback, is_one_server=all_loopback or _is_ip(host))

    @classmethod
    def _without_port(cls, target: str) -> Self:
        scheme, _, place = target.partition(":")
        if not place.strip("/"):
            raise ValueError(f"{target!r} names no server after {scheme}: ; {_FORMS}")
        is_socket = target.startswith(_SOCKETS)
        return cls(target, (target,), all_loopback=is_socket, is_one_server=is_socket)

    @classmethod
    def _of_list(cls, listed: list[str]) -> Self:
        families = {_family(each) for each in listed}
        if len(families) > 1:
            raise ValueError(f"{','.join(listed)} mixes IPv4 and IPv6 addresses: give addresses of one kind")
        hosts = tuple(_host(each) for each in listed)
        return cls(
            f"{families.pop()}:{','.join(listed)}",
            hosts,
            authority=listed[0],
            all_loopback=all(is_loopback(host) for host in hosts),
            is_one_server=len(hosts) == 1,
        )


def _host(address: str) -> str:
    return address.rpartition(":")[0]


def _host_with_port(address: str, place: str) -> str:
    """The host of HOST:PORT, which is `address` or the end of it.

    Raises:
        ValueError: It has another form, or the port is not one from 1 to 65535.
    """
    host, colon, port = place.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not colon or not host or (":" in host and not bracketed):
        raise ValueError(f"{address!r} is not an address with a host and a port: {_FORMS}")
    _check_port(address, port)
    if "/" in host or _NOT_IN_ADDRESSES.search(host):
        raise ValueError(f"the host in {address!r} has a character that no name of a host has: {_FORMS}")
    return host


def _check_port(address: str, port: str) -> None:
    """Refuses a port that is not from 1 to 65535. gRPC would connect to another: to 34463 for 99999."""
    if not (port.isascii() and port.isdecimal() and len(port) <= len(str(_MAX_PORT)) and 1 <= int(port) <= _MAX_PORT):
        raise ValueError(f"the port in {address!r} is {port!r}, but must be a number from 1 to {_MAX_PORT}")


def _is_ip(host: str) -> bool:
    return bool(_version(host.removeprefix("[").removesuffix("]")))


def _version(host: str) -> int:
    """4 or 6 for an IP address, 0 for anything else."""
    try:
        version: int = ipaddress.ip_address(host).version
    except ValueError:
        return 0
    return version


def _family(address: str) -> str:
    """The scheme of gRPC for an address IP:PORT: "ipv4" or "ipv6"."""
    host, _, port = address.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    version = _version(host[1:-1] if bracketed else host)
    if not port or version != (6 if bracketed else 4):
        raise ValueError(
            f"{address!r} is not an IP address with a port, which each of several addresses must be: {_FORMS}"
        )
    _check_port(address, port)
    return f"ipv{version}"
