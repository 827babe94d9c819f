"""Phoenix, which shows traces to people, as one more process of a mesh on one machine."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from meshserve.supervisor.probes import PageProbe
from meshserve.supervisor.spec import ListenAddress, ProcessSpec
from meshserve.supervisor.statedir import StateDir
from services.runtime.modelfiles import default_cache_dir
from services.runtime.settings import PhoenixSettings, Settings

NAME = "phoenix"
# The project that its pages show the traces under.
PROJECT = "meshserve"
START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 10.0


class PhoenixMissingError(Exception):
    """There is no Phoenix on this machine; `way_out` installs it."""

    def __init__(self) -> None:
        super().__init__("Phoenix, which shows traces, is not installed")
        home = own_environment()
        self.way_out = (
            f"give it an environment of its own: python3 -m venv {home} && "
            f"{home}/bin/pip install arize-phoenix; or set telemetry.phoenix.command"
        )


def own_environment() -> Path:
    """Where an environment of Phoenix's own is looked for: its requirements are many, and need not
    fit ours."""
    return default_cache_dir() / "phoenix"


def find_command(settings: PhoenixSettings, environment: Mapping[str, str]) -> Path:
    """The executable: the one that is set, or one installed beside us, for itself, or on the PATH.

    Raises PhoenixMissingError.
    """
    if settings.command is not None:
        candidates = [settings.command.expanduser()]
    else:
        on_path = shutil.which(NAME, path=environment.get("PATH"))
        candidates = [
            Path(sys.executable).parent / NAME,
            own_environment() / "bin" / NAME,
            *([Path(on_path)] if on_path else []),
        ]
    for candidate in candidates:
        if candidate.is_file():
            return candidate.absolute()
    raise PhoenixMissingError


def page_url(settings: PhoenixSettings) -> str:
    """Where a person looks."""
    return f"http://127.0.0.1:{settings.port}"


def export_environment(settings: Settings) -> dict[str, str]:
    """What makes the services send their spans to Phoenix, under a project of their own."""
    phoenix = settings.telemetry.phoenix
    environment = {
        "MESHSERVE_TELEMETRY__OTLP_ENDPOINT": f"http://127.0.0.1:{phoenix.otlp_port}",
        "MESHSERVE_TELEMETRY__OPENINFERENCE": "true",
        "OTEL_RESOURCE_ATTRIBUTES": f"openinference.project.name={PROJECT}",
    }
    if settings.telemetry.trace_url is None:
        environment["MESHSERVE_TELEMETRY__TRACE_URL"] = (
            f"{page_url(phoenix)}/redirects/traces/{{trace_id}}"
        )
    return environment


def phoenix_spec(
    settings: PhoenixSettings, state: StateDir, environment: Mapping[str, str]
) -> ProcessSpec:
    """The process. The mesh serves without it, too. Raises PhoenixMissingError."""
    command = find_command(settings, environment)
    state.phoenix_dir.mkdir(parents=True, exist_ok=True)
    return ProcessSpec(
        name=NAME,
        command=(str(command), "serve"),
        probe=PageProbe(page_url(settings)),
        environment={
            **environment,
            "PHOENIX_WORKING_DIR": str(state.phoenix_dir),
            "PHOENIX_HOST": "127.0.0.1",
            "PHOENIX_PORT": str(settings.port),
            "PHOENIX_GRPC_PORT": str(settings.otlp_port),
            # Nothing that it shows is fetched from elsewhere, and it tells nobody of its use.
            "PHOENIX_ALLOW_EXTERNAL_RESOURCES": "false",
            "PHOENIX_TELEMETRY_ENABLED": "false",
            "PHOENIX_DISABLE_AGENT_ASSISTANT": "true",
            "PHOENIX_LOG_MIGRATIONS": "false",
        },
        addresses=(
            ListenAddress("telemetry.phoenix.port", f"127.0.0.1:{settings.port}"),
            ListenAddress("telemetry.phoenix.otlp_port", f"127.0.0.1:{settings.otlp_port}"),
        ),
        stage=1,
        start_timeout_s=START_TIMEOUT_S,
        stop_timeout_s=STOP_TIMEOUT_S,
        essential=False,
    )
