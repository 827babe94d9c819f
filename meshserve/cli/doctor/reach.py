"""Whether what the settings point to can be reached: Valkey, other services, who takes traces."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from urllib.parse import urlsplit

from meshserve.cli.doctor.findings import Finding, ok, problem, warning
from meshserve.supervisor.plan import SERVICES
from services.runtime.settings import Settings
from services.runtime.settings.targets import parse_target
from services.runtime.telemetry import Metrics
from services.runtime.valkey import ValkeyError, ValkeyUrlError, connect_as_set

TIMEOUT_S = 3.0


async def valkey(settings: Settings) -> AsyncIterator[Finding]:
    """The server that replicas share, where it is not the embedded one."""
    if settings.valkey.is_embedded:
        return
    try:
        client = connect_as_set(settings.valkey, Metrics("cache"))
    except ValkeyUrlError as error:
        yield problem(
            f"the URL of Valkey cannot be used: {error}", "docs/configuration.md shows its forms"
        )
        return
    try:
        await client.ping()
    except ValkeyError as error:
        yield problem(
            f"Valkey cannot be used: {error}",
            "start it, or mend valkey.url or its file; limits and cached answers are kept there",
        )
    else:
        yield ok(f"Valkey answers at {client.name}")
    finally:
        await client.close()


async def targets(settings: Settings) -> AsyncIterator[Finding]:
    """The names under which services are to find each other, where they are not all here."""
    named = {f"{name}.target": settings.server(name).target for name in SERVICES}
    named |= {
        f"models.{name}.engine_target": model.engine_target
        for name, model in settings.models.items()
    }
    for setting, target in named.items():
        if target is None:
            continue
        for name in parse_target(target).names:
            try:
                found = await asyncio.get_running_loop().getaddrinfo(
                    name.host, name.port, type=socket.SOCK_STREAM
                )
            except OSError:
                yield problem(
                    f"{setting}: {name.host!r} has no address",
                    "start that service, or mend the name; only what runs has one",
                )
            else:
                count = len({address for *_, address in found})
                yield ok(f"{setting}: {name} has {count} address{'es' if count > 1 else ''}")


async def traces(settings: Settings) -> AsyncIterator[Finding]:
    """Who takes the traces."""
    endpoint = settings.telemetry.otlp_endpoint
    if endpoint is None:
        return
    parts = urlsplit(endpoint if "//" in endpoint else f"//{endpoint}")
    try:
        async with asyncio.timeout(TIMEOUT_S):
            _, writer = await asyncio.open_connection(parts.hostname, parts.port or 4317)
    except (OSError, ValueError, TimeoutError):
        yield warning(
            f"nobody takes traces at {endpoint}",
            "start a collector there, or remove telemetry.otlp_endpoint; requests go on without",
        )
    else:
        writer.close()
        yield ok(f"traces are taken at {endpoint}")
