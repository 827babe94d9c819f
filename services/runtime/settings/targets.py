"""gRPC targets: which of their addresses are known, and which names have to be looked up."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from services.runtime.settings.addresses import UNIX_SOCKET, split_address


@dataclass(frozen=True, slots=True)
class Name:
    """A name whose addresses may change."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Target:
    """Where the replicas of a service are.

    `addresses` are `IP:PORT`, `[IPV6]:PORT` or `unix:PATH`.
    """

    addresses: tuple[str, ...]
    names: tuple[Name, ...]


def parse_target(target: str) -> Target:
    """What a target stands for: `HOST:PORT`, or several of them with commas between, each a name,
    an IPv4 or a bracketed IPv6 address; the same after `dns:`, `dns:///`, `ipv4:` or `ipv6:`; or a
    unix socket, `unix:PATH` or `unix-abstract:NAME`.

    Raises ValueError for anything else.
    """
    if target.startswith(UNIX_SOCKET):
        return Target((target,), ())
    entries = target
    for scheme in ("dns:///", "dns:", "ipv4:", "ipv6:"):
        if target.startswith(scheme):
            entries = target.removeprefix(scheme)
            break
    addresses: dict[str, None] = {}
    names: dict[Name, None] = {}
    for entry in entries.split(","):
        host, port = split_address(entry.strip())
        try:
            ipaddress.ip_address(host)
        except ValueError:
            names[Name(host, port)] = None
        else:
            addresses[socket_address(host, port)] = None
    return Target(tuple(addresses), tuple(names))


def socket_address(host: str, port: int) -> str:
    """`IP:PORT`, or `[IPV6]:PORT`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def grpc_target(address: str) -> str:
    """The gRPC target of one address."""
    if address.startswith(UNIX_SOCKET):
        return address
    return f"ipv6:{address}" if address.startswith("[") else f"ipv4:{address}"
