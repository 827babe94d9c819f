"""`meshserve up`: a whole mesh on this machine."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path
from typing import Any

import click

from meshserve.cli.exits import EXIT_CONFIGURATION, EXIT_UNAVAILABLE, CommandError
from meshserve.cli.output import lasting_console
from meshserve.supervisor.mesh import Mesh, UpOptions
from meshserve.supervisor.statedir import AlreadyRunningError, StateDir, StateError


@click.command("up")
@click.option(
    "-c",
    "--config",
    type=click.Path(path_type=Path, dir_okay=False),
    envvar="MESHSERVE_CONFIG",
    metavar="FILE",
    help="YAML file of settings.  [env: MESHSERVE_CONFIG]",
)
@click.option(
    "-m",
    "--model",
    metavar="NAME|PATH",
    help="Serve this model alone: a catalogue name, a .gguf file, a directory or a hub id.",
)
@click.option(
    "--traces",
    is_flag=True,
    help="Record a trace of every request, and start Phoenix to show them.",
)
@click.option("--logs", is_flag=True, help="Show the logs of all services from the start.")
@click.option("--no-greeting", is_flag=True, help="Do not ask the model for a first answer.")
def command(
    config: Path | None, model: str | None, traces: bool, logs: bool, no_greeting: bool
) -> int:
    """Start a mesh on this machine and serve until Ctrl-C.

    Pulls the model if it is missing, starts an embedded Valkey (unless valkey.url names a server)
    and the five services, waits until all are healthy, and shows one answer of the model.
    """
    started_s = time.monotonic()
    try:
        from meshserve.cli import services
        from meshserve.supervisor.phoenix import PhoenixMissingError
        from services.runtime.valkey import EmbeddedValkeyError
    except ImportError as error:
        raise CommandError(
            f"the services are not installed ({error})", "pip install 'meshserve[all]'"
        ) from None
    if config is not None:
        config = config.absolute()
    overrides = services.model_environment(model) if model is not None else {}
    environment = {**os.environ, **overrides}
    settings = services.read_settings(config, environment)
    if traces:
        environment.update(services.trace_environment(settings))
    state = StateDir.default(environment)
    try:
        state.acquire()
    except AlreadyRunningError as error:
        raise _already_running(error, state) from None
    except StateError as error:
        raise CommandError(str(error)) from None
    # So that what a pull has begun is cleaned up: SIGTERM alone would end us on the spot.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return _run(
            config,
            settings,
            state,
            environment,
            UpOptions(
                show_logs=logs, show_traces=traces, greet=not no_greeting, started_s=started_s
            ),
        )
    except EmbeddedValkeyError as error:
        raise CommandError(str(error), exit_code=EXIT_CONFIGURATION) from None
    except PhoenixMissingError as error:
        raise CommandError(str(error), error.way_out, exit_code=EXIT_CONFIGURATION) from None
    except StateError as error:
        raise CommandError(str(error)) from None
    finally:
        state.release()


def _run(
    config: Path | None,
    settings: Any,
    state: StateDir,
    environment: dict[str, str],
    options: UpOptions,
) -> int:
    from meshserve.cli.services import check_models, fetch_model
    from meshserve.supervisor.plan import process_specs, running_mesh, service_tls
    from meshserve.supervisor.ports import AddressError, check_addresses

    check_models(settings)
    specs = process_specs(settings, config, state, environment, show_traces=options.show_traces)
    try:
        check_addresses(address for spec in specs for address in spec.addresses)
    except AddressError as error:
        raise CommandError(str(error), exit_code=EXIT_CONFIGURATION) from None
    mesh_entry = running_mesh(settings, show_traces=options.show_traces)
    state.write(mesh_entry)
    for model in settings.models.values():
        fetch_model(model.source, settings.model_cache)

    async def serve() -> int:
        trust = service_tls(settings.gateway)
        return await Mesh(specs, mesh_entry, state, lasting_console(), options, trust).run()

    return asyncio.run(serve())


def _already_running(error: AlreadyRunningError, state: StateDir) -> CommandError:
    if error.mesh is None:
        who = "a mesh is starting or stopping"
    else:
        who = f"a mesh is running already (process {error.mesh.pid}, {error.mesh.gateway.target})"
    return CommandError(
        f"{who}; its state is in {state.path}",
        "talk to it with `meshserve chat`, stop it with `meshserve down`, or set MESHSERVE_STATE "
        "to another directory for a second one",
        exit_code=EXIT_UNAVAILABLE,
    )
