"""Addresses that services listen on."""

from __future__ import annotations

import ipaddress

UNIX_SOCKET = ("unix:", "unix-abstract:")


def split_address(address: str) -> tuple[str, int]:
    """Host and port of `HOST:PORT`, `[IPV6]:PORT`. Raises ValueError for anything else."""
    host, separator, port = address.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    is_port = port.isascii() and port.isdigit() and len(port) <= 5 and int(port) <= 65535
    is_host = bool(bare) and not set(bare) & set("/[] ") and (":" in bare) == (bare != host)
    if not separator or not is_port or not is_host:
        raise ValueError(f"{address!r} is not HOST:PORT")
    return bare, int(port)


def is_loopback(address: str) -> bool:
    """Whether an address can be reached from this machine alone."""
    if address.startswith(UNIX_SOCKET):
        return True
    host, _ = split_address(address)
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
