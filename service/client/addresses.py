"""Where the servers are: one address, several addresses, or a DNS name that has an address for each server."""

import ipaddress
from dataclasses import dataclass
from typing import Self

from service.ports import is_loopback

_FORMS = "write HOST:PORT, or IP:PORT,IP:PORT,…, or dns:///NAME:PORT for all addresses of a name"


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
            ValueError: One of several addresses is not an IP address with a port, or IPv4 and IPv6 are mixed.
        """
        if "," in target:
            return cls._of_list([each.strip() for each in target.split(",")])
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


def _family(address: str) -> str:
    """The scheme of gRPC for an address IP:PORT: "ipv4" or "ipv6"."""
    host, _, port = address.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    version: int
    try:
        version = ipaddress.ip_address(host[1:-1] if bracketed else host).version
    except ValueError:
        version = 0
    if not port.isdecimal() or version != (6 if bracketed else 4):
        raise ValueError(
            f"{address!r} is not an IP address with a port, which each of several addresses must be: {_FORMS}"
        )
    return f"ipv{version}"
