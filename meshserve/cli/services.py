"""What the commands share that need the services installed; nothing here is imported by others."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TransferSpeedColumn,
)

from meshserve.cli.exits import EXIT_CONFIGURATION, CommandError
from meshserve.cli.output import stderr_console
from meshserve.supervisor.phoenix import export_environment
from services.runtime.modelfiles import (
    CATALOGUE,
    ModelFileError,
    ModelStoreError,
    check_source,
    locate,
    pull,
)
from services.runtime.settings import ModelSettings, Settings, SettingsError, load_settings


def read_settings(config: Path | None, environment: Mapping[str, str] = os.environ) -> Settings:
    """The settings, or a CommandError that lists what is wrong with them."""
    try:
        return load_settings(config, environment)
    except SettingsError as error:
        raise CommandError(
            str(error), "docs/configuration.md lists every setting", exit_code=EXIT_CONFIGURATION
        ) from None


def model_cache() -> Path | None:
    """Where `meshserve up` would look for models; None is the model store's own default."""
    return read_settings(None).model_cache


def sources_in_settings() -> list[str]:
    """Where the models that the settings name come from, draft models among them."""
    settings = read_settings(None)
    draft = settings.engine.speculation.draft_model
    return [model.source for model in settings.models.values()] + ([draft] if draft else [])


def model_in_settings(name: str) -> ModelSettings | None:
    """The model that the settings have under a name."""
    return read_settings(None).models.get(name)


def model_environment(model: str) -> dict[str, str]:
    """The setting `models` that serves one model alone: a catalogue name, a path or a hub id."""
    path = Path(model).expanduser()
    source = str(path.absolute()) if path.exists() else model
    name = model if model in CATALOGUE else path.stem if path.exists() else model
    models = yaml.safe_dump({name: {"source": source}}, default_flow_style=True)
    # A model that the file chose for the engine is not among these.
    return {"MESHSERVE_MODELS": models, "MESHSERVE_ENGINE__MODEL": "null"}


def trace_environment(settings: Settings) -> dict[str, str]:
    """The settings that send the traces to Phoenix. Raises CommandError where they go elsewhere."""
    endpoint = settings.telemetry.otlp_endpoint
    if endpoint is not None:
        raise CommandError(
            f"traces go to {endpoint} already (telemetry.otlp_endpoint)",
            "look at them there, or remove that setting for Phoenix to get them",
            exit_code=EXIT_CONFIGURATION,
        )
    return export_environment(settings)


def check_models(settings: Settings) -> None:
    """Raises CommandError where a model's source cannot be one, before anything is pulled."""
    with store_errors():
        for model in settings.models.values():
            check_source(model.source)


def fetch_model(source: str, cache_dir: Path | None) -> Path:
    """The model's place on this machine, pulled with a progress bar when missing."""
    with store_errors():
        try:
            return locate(source, cache_dir)
        except ModelStoreError:
            return pull_model(source, cache_dir)


def pull_model(source: str, cache_dir: Path | None) -> Path:
    """Pulls a model and shows how far it is. Raises CommandError."""
    with store_errors(), _progress() as report:
        return pull(source, cache_dir, report)


@contextmanager
def store_errors() -> Iterator[None]:
    """Turns what the model store raises into a CommandError."""
    try:
        yield
    except ModelStoreError as error:
        raise CommandError(error.problem, error.way_out) from None
    except ModelFileError as error:
        raise CommandError(str(error), "pull the model again, or give another one") from None
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise CommandError(
            f"{where}{error.strerror}",
            "set MESHSERVE_CACHE or model_cache to a directory with room that can be written",
        ) from None


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on a terminal, a line for each thing done elsewhere."""
    console = stderr_console()
    if not console.is_terminal:
        said: set[str] = set()

        def tell(doing: str, done: int, total: int) -> None:
            if doing not in said:
                said.add(doing)
                size = f" ({total / 1e6:.0f} MB)" if total else ""
                console.print(f"{doing}{size}", markup=False)

        yield tell
        return
    columns: list[Any] = [
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
    ]
    with Progress(*columns, console=console, transient=True) as progress:
        tasks: dict[str, TaskID] = {}

        def draw(doing: str, done: int, total: int) -> None:
            if doing not in tasks:
                tasks[doing] = progress.add_task(doing, total=total or None)
            progress.update(tasks[doing], completed=done, total=total or None)

        yield draw
