"""Where the servers are: one address, several addresses, or a DNS name that has an address for each server."""

import ipaddress
from dataclasses import dataclass
from typing import Self

from service.ports import is_loopback

_FORMS = "write HOST:PORT, or IP:PORT,IP:PORT,…, or dns:///NAME:PORT for all addresses of a name"
_MAX_PORT = 65535
# Schemes of gRPC whose addresses end with HOST or HOST:PORT, and those whose addresses have no port.
_WITH_PORT = ("dns:", "ipv4:", "ipv6:")
_WITHOUT_PORT = ("unix:", "unix-abstract:", "vsock:", "xds:", "google-c2p:")


@dataclass(frozen=True)
class Addresses:
    """The servers that one client calls in turn.

    Attributes:
        target: The same in the form that gRPC expects.
        hosts: Names or IP addresses of the servers, without ports.
        authority: HOST:PORT that requests name as their server, if gRPC's own choice would not be one.
    """

    target: str
    hosts: tuple[str, ...]
    authority: str | None = None

    @classmethod
    def parse(cls, target: str) -> Self:
        """Reads HOST:PORT, IP:PORT,IP:PORT,… or a URI that gRPC knows, such as dns:///NAME:PORT.

        Raises:
            ValueError: The address is empty, a port is not one from 1 to 65535, one of several addresses is not an IP
                address with a port, or IPv4 and IPv6 are mixed.
        """
        if not target.strip():
            raise ValueError(f"the address of the server is empty: {_FORMS}")
        if "," in target:
            return cls._of_list([each.strip() for each in target.split(",")])
        if not target.startswith(_WITHOUT_PORT):
            _check_port(target)
        # The last part of dns://SERVER/NAME:PORT is what the addresses of the servers come from.
        return cls(target, (_host(target.rpartition("/")[2]),))

    @classmethod
    def _of_list(cls, listed: list[str]) -> Self:
        families = {_family(each) for each in listed}
        if len(families) > 1:
            raise ValueError(f"{','.join(listed)} mixes IPv4 and IPv6 addresses: give addresses of one kind")
        hosts = tuple(_host(each) for each in listed)
        return cls(f"{families.pop()}:{','.join(listed)}", hosts, authority=listed[0])

    @property
    def all_loopback(self) -> bool:
        """Whether all servers run on this machine."""
        return all(is_loopback(host) for host in self.hosts)


def _host(address: str) -> str:
    return address.rpartition(":")[0]


def _check_port(address: str) -> None:
    """Refuses a port that is not from 1 to 65535. gRPC would connect to another: to 34463 for 99999, to 65535 for -1.

    Args:
        address: HOST, HOST:PORT or a URI that ends with one of them.

    Raises:
        ValueError: The port is another text.
    """
    place = address.rpartition("/")[2]
    for scheme in _WITH_PORT:
        place = place.removeprefix(scheme)
    host, colon, port = place.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not colon or (":" in host and not bracketed):  # a host without a port, such as [::1] or ::1
        return
    if not (port.isascii() and port.isdecimal() and len(port) <= len(str(_MAX_PORT)) and 1 <= int(port) <= _MAX_PORT):
        raise ValueError(f"the port in {address!r} is {port!r}, but must be a number from 1 to {_MAX_PORT}")


def _family(address: str) -> str:
    """The scheme of gRPC for an address IP:PORT: "ipv4" or "ipv6"."""
    host, _, port = address.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    version: int
    try:
        version = ipaddress.ip_address(host[1:-1] if bracketed else host).version
    except ValueError:
        version = 0
    if not port or version != (6 if bracketed else 4):
        raise ValueError(
            f"{address!r} is not an IP address with a port, which each of several addresses must be: {_FORMS}"
        )
    _check_port(address)
    return f"ipv{version}"
