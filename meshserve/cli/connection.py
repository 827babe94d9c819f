"""Options of the commands that talk to a gateway, and the client that they make."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click

from meshserve.client import Client
from meshserve.supervisor.statedir import StateDir
from meshserve.transport import API_KEY_VARIABLE, DEFAULT_TARGET, DEFAULT_TIMEOUT_S, TLS

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Connection:
    """Where the gateway is and how to get in."""

    target: str
    api_key: str | None
    timeout_s: float | None
    tls: TLS | bool

    def client(self) -> Client:
        """A client of the gateway. Raises ConfigurationError."""
        return Client(self.target, api_key=self.api_key, timeout=self.timeout_s, tls=self.tls)


def connection_options(command: F) -> F:
    """Adds --target, --api-key, --timeout, --tls and --tls-ca to a command."""
    decorators = [
        click.option(
            "--target",
            envvar="MESHSERVE_TARGET",
            metavar="HOST:PORT",
            help="Gateway to talk to.  [default: the mesh on this machine, else "
            f"{DEFAULT_TARGET}; env: MESHSERVE_TARGET]",
        ),
        click.option(
            "--api-key",
            envvar=API_KEY_VARIABLE,
            metavar="KEY",
            help=f"API key.  [env: {API_KEY_VARIABLE}]",
        ),
        click.option(
            "--timeout",
            "timeout_s",
            type=float,
            default=DEFAULT_TIMEOUT_S,
            show_default=True,
            metavar="SECONDS",
            help="Longest wait for a whole answer; 0 waits for ever.",
        ),
        click.option("--tls", is_flag=True, help="Talk TLS."),
        click.option(
            "--tls-ca",
            envvar="MESHSERVE_TLS_CA",
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="PEM file of the CA to trust; implies --tls.  [env: MESHSERVE_TLS_CA]",
        ),
    ]
    for decorate in reversed(decorators):
        command = decorate(command)
    return command


def make_connection(
    target: str | None,
    api_key: str | None,
    timeout_s: float,
    tls: bool,
    tls_ca: Path | None,
) -> Connection:
    """What the options mean; without a target, a mesh that runs on this machine is found."""
    trust: TLS | bool = TLS(ca_file=tls_ca) if tls_ca is not None else tls
    if target is None:
        mesh = StateDir.default().running_mesh()
        target = DEFAULT_TARGET if mesh is None else mesh.gateway.target
        if mesh is not None and mesh.gateway.ca_file is not None and trust is False:
            trust = TLS(ca_file=mesh.gateway.ca_file)
    return Connection(target, api_key, timeout_s or None, trust)
