"""`meshserve status`: the health of every service, and the models."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import dataclass
from pathlib import Path

import click
from rich.table import Table
from rich.text import Text

from meshserve.cli.connection import connection_options, make_connection
from meshserve.cli.exits import EXIT_UNAVAILABLE
from meshserve.cli.jsonify import write_json
from meshserve.cli.output import print_error, print_table
from meshserve.errors import MeshServeError
from meshserve.health import Health, HealthChecker
from meshserve.supervisor.probes import page_problem
from meshserve.supervisor.statedir import RunningMesh, ServiceEntry, StateDir
from meshserve.transport import TLS, Endpoint, make_endpoint
from meshserve.types import Model

CHECK_TIMEOUT_S = 3.0


@dataclass(frozen=True, slots=True)
class ServiceHealth:
    """One service and its health."""

    name: str
    target: str
    health: Health


@click.command("status")
@click.option("--json", "as_json", is_flag=True, help="Write the status as JSON.")
@connection_options
def command(
    as_json: bool,
    target: str | None,
    api_key: str | None,
    timeout_s: float,
    tls: bool,
    tls_ca: Path | None,
) -> int:
    """Show the health of every service and the models.

    Exits with 0 when all services are serving and a model is ready, else with 3; what shows traces
    may be away. With --target only that gateway is asked.
    """
    mesh = StateDir.default().running_mesh() if target is None else None
    connection = make_connection(target, api_key, timeout_s, tls, tls_ca)
    limit_s = min(connection.timeout_s or CHECK_TIMEOUT_S, CHECK_TIMEOUT_S)
    if mesh is not None:
        services = asyncio.run(check_services(mesh, limit_s))
    else:
        gateway = {"gateway": _endpoint(connection.target, connection.tls)}
        services = asyncio.run(_check_all(gateway, limit_s))
    console = _console(mesh, services) if mesh is not None else None
    traces_url = mesh.traces_url if mesh is not None else None
    traces = _check_traces(traces_url) if traces_url is not None else None
    models: list[Model] = []
    problem: MeshServeError | None = None
    if all(s.health is Health.SERVING for s in services if s.name == "gateway"):
        try:
            with connection.client() as client:
                models = client.models(timeout=limit_s)
        except MeshServeError as error:
            problem = error
    healthy = all(s.health is Health.SERVING for s in services) and any(m.ready for m in models)
    if as_json:
        document = {
            "healthy": healthy,
            "services": services,
            "models": models,
            "console": console,
            "traces": traces,
        }
        write_json(document, sys.stdout)
    else:
        _print([*services, *(page for page in (console, traces) if page is not None)], models)
    if problem is not None:
        print_error(f"the models cannot be listed: {problem.message}")
    elif not healthy and mesh is None and services[0].health is Health.UNREACHABLE:
        print_error(
            f"no MeshServe gateway answers at {connection.target}",
            "start a mesh with `meshserve up`, or name one with --target HOST:PORT",
        )
    return 0 if healthy else EXIT_UNAVAILABLE


async def check_services(mesh: RunningMesh, timeout_s: float) -> list[ServiceHealth]:
    """The health of every service of a mesh on this machine."""
    entries = {entry.name: _entry_endpoint(entry) for entry in mesh.services}
    return await _check_all(entries, timeout_s)


async def _check_all(entries: dict[str, Endpoint], timeout_s: float) -> list[ServiceHealth]:
    async def check(name: str, endpoint: Endpoint) -> ServiceHealth:
        checker = HealthChecker(endpoint)
        try:
            health = await checker.check(timeout_s=timeout_s)
        finally:
            await checker.close()
        return ServiceHealth(name, endpoint.target, health)

    return list(await asyncio.gather(*(check(*entry) for entry in entries.items())))


def _console(mesh: RunningMesh, services: list[ServiceHealth]) -> ServiceHealth | None:
    """The web console, which is as well as the gateway that serves it."""
    if mesh.console_url is None:
        return None
    gateway = next(each for each in services if each.name == "gateway")
    return ServiceHealth("console", mesh.console_url, gateway.health)


def _check_traces(url: str) -> ServiceHealth:
    health = Health.UNREACHABLE if page_problem(url) else Health.SERVING
    return ServiceHealth("traces", url, health)


def _entry_endpoint(entry: ServiceEntry) -> Endpoint:
    return _endpoint(entry.target, TLS(ca_file=entry.ca_file) if entry.ca_file else False)


def _endpoint(target: str, tls: TLS | bool) -> Endpoint:
    return make_endpoint(target, api_key="", timeout=None, tls=tls, metadata=None)


def _print(services: list[ServiceHealth], models: list[Model]) -> None:
    table = Table.grid(padding=(0, 2))
    for service in services:
        style = "green" if service.health is Health.SERVING else "red"
        table.add_row(
            Text(service.name), Text(service.health, style=style), Text(service.target, style="dim")
        )
    for model in models:
        name = model.state or ("ready" if model.ready else "not ready")
        state = Text(name, style="green" if model.ready else "red")
        table.add_row(Text(f"model {model.name}"), state, Text(describe_model(model), style="dim"))
    print_table(table)


def describe_model(model: Model) -> str:
    """A model's outline in one line."""
    parts = [model.architecture, model.dtype]
    if model.context_tokens:
        parts.insert(1, f"{model.parameters / 1e6:.0f}M parameters")
        parts.append(f"{model.context_tokens} tokens of context")
    if model.capabilities:
        parts.append("can " + " and ".join(model.capabilities))
    if model.embedding_size:
        parts.append(f"{model.embedding_size} components")
    if model.labels:
        parts.append(f"{len(model.labels)} classes")
    if model.adapters:
        parts.append("adapters " + " and ".join(model.adapters))
    if model.is_default:
        parts.append("default")
    if model.aliases:
        parts.append("also " + ", ".join(model.aliases))
    return ", ".join(part for part in parts if part)
