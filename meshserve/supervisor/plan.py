"""Which processes a mesh on one machine consists of, from its settings."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from meshserve.supervisor.phoenix import page_url, phoenix_spec
from meshserve.supervisor.probes import GrpcProbe, ValkeyProbe
from meshserve.supervisor.spec import ListenAddress, ProcessSpec
from meshserve.supervisor.statedir import RunningMesh, ServiceEntry, StateDir
from meshserve.transport import TLS
from services.runtime.own_endpoint import own_endpoint
from services.runtime.settings import GatewaySettings, ServerSettings, Settings
from services.runtime.valkey import EmbeddedValkey

VALKEY = "valkey"
# The gateway comes last: it is stopped first, while what its requests in flight need still runs.
SERVICES = ("tokenizer", "engine", "cache", "safety", "gateway")
# A service that has drained needs a moment more to release what it holds.
STOP_MARGIN_S = 5.0
VALKEY_STOP_TIMEOUT_S = 5.0
VALKEY_START_TIMEOUT_S = 20.0
LOOPBACK_NAMES = "localhost,127.0.0.1,::1"


def process_specs(
    settings: Settings,
    config: Path | None,
    state: StateDir,
    environment: Mapping[str, str] = os.environ,
    *,
    show_traces: bool = False,
) -> list[ProcessSpec]:
    """The processes in the order of their start, one that shows traces among them on demand.

    Raises EmbeddedValkeyError when Valkey is needed and cannot be set up, and PhoenixMissingError.
    """
    child_environment = _child_environment(environment)
    specs = []
    if settings.valkey.is_embedded:
        specs.append(_valkey_spec(settings, state, child_environment))
    if show_traces:
        # Before the services, so that it outlives them and gets their last spans.
        specs.append(phoenix_spec(settings.telemetry.phoenix, state, child_environment))
    for name in SERVICES:
        section = settings.server(name)
        command = [sys.executable, "-m", f"services.{name}"]
        if config is not None:
            command += ["--config", str(config)]
        addresses = [ListenAddress(f"{name}.listen", section.listen)]
        if section.metrics_listen is not None:
            addresses.append(ListenAddress(f"{name}.metrics_listen", section.metrics_listen))
        if isinstance(section, GatewaySettings) and section.http_listen is not None:
            addresses.append(ListenAddress("gateway.http_listen", section.http_listen))
        specs.append(
            ProcessSpec(
                name=name,
                command=tuple(command),
                probe=GrpcProbe(own_endpoint(section).address, service_tls(section)),
                environment=child_environment,
                addresses=tuple(addresses),
                stage=1,
                stop_timeout_s=section.drain_timeout_s + STOP_MARGIN_S,
            )
        )
    return specs


def running_mesh(settings: Settings, *, show_traces: bool = False) -> RunningMesh:
    """What other processes are told of this mesh."""
    services = tuple(
        ServiceEntry(
            name,
            own_endpoint(section).address,
            str(section.tls.certificate.absolute()) if section.tls is not None else None,
        )
        for name, section in ((name, settings.server(name)) for name in SERVICES)
    )
    gateway = next(entry for entry in services if entry.name == "gateway")
    return RunningMesh(
        pid=os.getpid(),
        gateway=gateway,
        services=services,
        traces_url=page_url(settings.telemetry.phoenix) if show_traces else None,
        console_url=_console_url(settings.gateway),
    )


def service_tls(section: ServerSettings) -> TLS | bool:
    """How the supervisor, on the same machine, talks to a service; False without TLS."""
    endpoint = own_endpoint(section)
    if not endpoint.tls:
        return False
    return TLS(
        ca_file=endpoint.ca,
        certificate_file=endpoint.certificate or None,
        private_key_file=endpoint.private_key or None,
        server_name=endpoint.server_name or None,
    )


def _console_url(gateway: GatewaySettings) -> str | None:
    """Where a browser on this machine finds the console."""
    if gateway.http_listen is None:
        return None
    # The address as one to call: what listens on all of them is found on loopback.
    address = own_endpoint(gateway.model_copy(update={"listen": gateway.http_listen})).address
    return f"http{'s' if gateway.tls is not None else ''}://{address}"


def _valkey_spec(
    settings: Settings, state: StateDir, environment: Mapping[str, str]
) -> ProcessSpec:
    port = settings.valkey.embedded_port
    server = EmbeddedValkey(
        state.valkey_dir, port=port, max_memory_bytes=settings.valkey.embedded_max_bytes
    )
    return ProcessSpec(
        name=VALKEY,
        command=tuple(server.command()),
        probe=ValkeyProbe("127.0.0.1", port),
        environment=environment,
        addresses=(ListenAddress("valkey.embedded_port", f"127.0.0.1:{port}"),),
        stage=0,
        start_timeout_s=VALKEY_START_TIMEOUT_S,
        stop_timeout_s=VALKEY_STOP_TIMEOUT_S,
    )


def _child_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """What the processes inherit, with the mesh's own traffic kept away from HTTP proxies."""
    child = dict(environment)
    for name in ("no_proxy", "NO_PROXY"):
        child[name] = ",".join(filter(None, (child.get(name), LOOPBACK_NAMES)))
    return child
