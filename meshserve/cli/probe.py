"""`meshserve probe`: whether one service can do its work now, for whatever watches over it.

In a container `meshserve/__main__.py` answers most of these before this file is imported.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from meshserve.cli.exits import EXIT_UNAVAILABLE, CommandError
from meshserve.transport import normalize_target

if TYPE_CHECKING:
    from services.runtime.health_check import Endpoint

PEM_FILE = click.Path(path_type=Path, exists=True, dir_okay=False)
NAME_SCHEMES = ("dns:///", "dns:", "ipv4:", "ipv6:")
LONGEST_TIMEOUT_S = 86400.0


@click.command("probe")
@click.argument("what", metavar="SERVICE|HOST:PORT")
@click.option(
    "-c",
    "--config",
    type=click.Path(path_type=Path, dir_okay=False),
    envvar="MESHSERVE_CONFIG",
    help="YAML file of settings, for a service by its name.  [env: MESHSERVE_CONFIG]",
)
@click.option(
    "--liveness", is_flag=True, help="Ask whether it answers at all, also while it takes no work."
)
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(0, LONGEST_TIMEOUT_S, min_open=True),
    default=3.0,
    show_default=True,
)
@click.option("--tls", is_flag=True, help="Talk TLS.")
@click.option("--tls-ca", type=PEM_FILE, help="PEM file of the CA to trust.")
@click.option("--tls-certificate", type=PEM_FILE, help="PEM file to show.")
@click.option("--tls-key", type=PEM_FILE, help="Its private key.")
def command(
    what: str,
    config: Path | None,
    liveness: bool,
    timeout_s: float,
    tls: bool,
    tls_ca: Path | None,
    tls_certificate: Path | None,
    tls_key: Path | None,
) -> None:
    """Ask one service whether it can do its work now; exit with 0 if so, else with 3.

    The name of a service stands for the one on this machine: address and certificates come from its
    settings. For an address, the options say how to talk to it.
    """
    from services.runtime.health_check import LIVENESS, Endpoint, ask

    if ":" not in what:
        endpoint = _endpoint_by_settings(what, config)
    elif (tls_certificate is None) != (tls_key is None):
        raise click.UsageError("--tls-certificate and --tls-key go together")
    else:
        endpoint = Endpoint(
            _address(what),
            tls=tls or tls_ca is not None or tls_certificate is not None,
            ca=str(tls_ca or ""),
            certificate=str(tls_certificate or ""),
            private_key=str(tls_key or ""),
        )
    problem = ask(endpoint, LIVENESS if liveness else "", timeout_s)
    if problem:
        raise CommandError(f"{what} {problem}", exit_code=EXIT_UNAVAILABLE)
    click.echo(f"{what} is serving")


def _address(target: str) -> str:
    """The one address that a gRPC target stands for."""
    for scheme in NAME_SCHEMES:
        target = target.removeprefix(scheme)
    return normalize_target(target)


def _endpoint_by_settings(service: str, config: Path | None) -> Endpoint:
    """How a service on this machine is asked; the schema comes with the services."""
    try:
        from meshserve.cli.services import read_settings
        from services.runtime.own_endpoint import own_endpoint
        from services.runtime.settings.schema import SERVICE_NAMES
    except ImportError as error:
        raise CommandError(
            f"the services are not installed ({error})",
            "give an address, or pip install 'meshserve[all]'",
        ) from None
    if service not in SERVICE_NAMES:
        raise click.UsageError(
            f"{service!r} is neither HOST:PORT nor one of {', '.join(SERVICE_NAMES)}"
        )
    return own_endpoint(read_settings(config).server(service))
