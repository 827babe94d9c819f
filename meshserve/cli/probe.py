"""`meshserve probe`: whether one service can do its work now, for whatever watches over it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from meshserve.cli.exits import EXIT_UNAVAILABLE, CommandError
from meshserve.transport import TLS, Endpoint, make_endpoint

if TYPE_CHECKING:
    from services.runtime.settings import ServerSettings

# As services/runtime/health.py, which the client library comes without.
LIVENESS = "liveness"


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
@click.option("--timeout", "timeout_s", type=float, default=3.0, show_default=True)
@click.option("--tls", is_flag=True, help="Talk TLS.")
@click.option("--tls-ca", type=click.Path(path_type=Path), help="PEM file of the CA to trust.")
@click.option("--tls-certificate", type=click.Path(path_type=Path), help="PEM file to show.")
@click.option("--tls-key", type=click.Path(path_type=Path), help="Its private key.")
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
    if ":" in what:
        address = what
        given = tls or tls_ca or tls_certificate
        trust = TLS(tls_ca, tls_certificate, tls_key) if given else False
    else:
        address, trust = _listening(_section(what, config))
    endpoint = make_endpoint(address, api_key="", timeout=timeout_s, tls=trust, metadata=None)
    problem = _problem(endpoint, LIVENESS if liveness else "")
    if problem:
        raise CommandError(f"{what} {problem}", exit_code=EXIT_UNAVAILABLE)
    click.echo(f"{what} is serving")


def _listening(section: ServerSettings) -> tuple[str, TLS | bool]:
    """Where a service with these settings listens, and how to talk to it there."""
    address = section.model_copy(update={"target": None}).effective_target
    if section.tls is None:
        return address, False
    files = section.tls
    shows = files.client_ca is not None
    # The certificate carries the name by which others find the service.
    name = section.target.rpartition("/")[2].rpartition(":")[0] if section.target else None
    return address, TLS(
        ca_file=files.ca or files.certificate,
        certificate_file=files.certificate if shows else None,
        private_key_file=files.private_key if shows else None,
        server_name=name,
    )


def _problem(endpoint: Endpoint, health_name: str) -> str:
    """Why the service is not healthy, by a name of its health service; empty if it is."""
    with (
        grpc.insecure_channel(endpoint.target, endpoint.channel_options)
        if endpoint.credentials is None
        else grpc.secure_channel(endpoint.target, endpoint.credentials, endpoint.channel_options)
    ) as channel:
        try:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            answer = stub.Check(
                health_pb2.HealthCheckRequest(service=health_name), timeout=endpoint.timeout_s
            )
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                return f"did not answer within {endpoint.timeout_s:g} s"
            return f"cannot be asked: {error.details()}"
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        return "is not serving"
    return ""


def _section(service: str, config: Path | None) -> ServerSettings:
    """The settings of a service; the schema comes with the services."""
    try:
        from meshserve.cli.services import read_settings
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
    return read_settings(config).server(service)
