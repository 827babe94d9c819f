"""Tells before anything is started which addresses cannot be listened on, and why."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterable

from meshserve.supervisor.spec import ListenAddress


class AddressError(Exception):
    """Addresses that the mesh needs cannot be used; one line for each."""


def check_addresses(addresses: Iterable[ListenAddress]) -> None:
    """Raises AddressError unless each address can be listened on now."""
    owners: dict[str, str] = {}
    problems: list[str] = []
    for entry in addresses:
        if entry.address.startswith(("unix:", "unix-abstract:")):
            continue
        if entry.address in owners:
            problems.append(
                f"{entry.setting} and {owners[entry.address]} are both {entry.address}; "
                f"give one of them another port"
            )
            continue
        owners[entry.address] = entry.setting
        problem = _problem(entry)
        if problem:
            problems.append(problem)
    if problems:
        raise AddressError("\n".join(problems))


def _problem(entry: ListenAddress) -> str | None:
    host, _, port_text = entry.address.rpartition(":")
    host, port = host.strip("[]"), int(port_text)
    if port == 0:
        return f"{entry.setting} is {entry.address}; give it a fixed port, so that it can be found"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError:
        return f"{entry.setting}: there is no address {host!r} on this machine"
    with socket.socket(family, kind, protocol) as listener:
        # As servers do: connections that linger in TIME_WAIT are no obstacle.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
            listener.listen(1)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return (
                    f"port {port} is in use{_by_whom(port)}; stop that, or set {entry.setting} "
                    f"({entry.setting_variable}) to another address"
                )
            return f"{entry.setting}: {entry.address} cannot be listened on: {error.strerror}"
    return None


def _by_whom(port: int) -> str:
    """` by NAME (process PID)`, where it can be found out."""
    try:
        import psutil
    except ImportError:
        return ""
    try:
        connections = psutil.net_connections(kind="tcp")
    except (psutil.Error, OSError):
        return ""
    for connection in connections:
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port:
            if connection.pid is None or connection.pid == os.getpid():
                break
            try:
                return f" by {psutil.Process(connection.pid).name()} (process {connection.pid})"
            except psutil.Error:
                return f" by process {connection.pid}"
    return ""
