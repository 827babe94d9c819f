"""`meshserve models`: pull, list, show, load and unload models."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import click
from rich.table import Table
from rich.text import Text

from meshserve.cli import hosting
from meshserve.cli.connection import connection_options, make_connection
from meshserve.cli.exits import EXIT_FAILED, CommandError
from meshserve.cli.jsonify import write_json
from meshserve.cli.output import print_table, stderr_console
from meshserve.cli.status import describe_model
from meshserve.errors import ConnectError


@click.group("models")
def command() -> None:
    """Pull, list and show models; load and unload them on the engines of a mesh."""


for each in hosting.COMMANDS:
    command.add_command(each)


@command.command("pull")
@click.argument("source", required=False)
def pull(source: str | None) -> None:
    """Make a model available on this machine and print where it is.

    SOURCE is a catalogue name such as smollm2-135m, or a hub id ORG/NAME[@REVISION]. Without it,
    all models that the settings name are pulled.
    """
    services = _store()
    for each in services.sources_in_settings() if source is None else [source]:
        click.echo(str(services.pull_model(each, services.model_cache())))


@command.command("list")
@click.option("--offline", is_flag=True, help="List the models on this machine.")
@click.option("--json", "as_json", is_flag=True, help="Write the list as JSON.")
@connection_options
def list_models(
    offline: bool,
    as_json: bool,
    target: str | None,
    api_key: str | None,
    timeout_s: float,
    tls: bool,
    tls_ca: Path | None,
) -> None:
    """List the models that the gateway serves, or where none answers, those on this machine."""
    if not offline:
        try:
            connection = make_connection(target, api_key, timeout_s, tls, tls_ca)
            with connection.client() as client:
                models = client.models()
        except ConnectError as error:
            if target is not None:
                raise
            stderr_console().print(
                Text(f"{error.message.partition(' (')[0]}; on this machine:", style="dim")
            )
        else:
            if as_json:
                write_json(models, sys.stdout)
                return
            table = Table.grid(padding=(0, 2))
            for model in models:
                state = model.state or ("ready" if model.ready else "not ready")
                style = "green" if model.ready else "red"
                table.add_row(
                    Text(model.name), Text(state, style=style), Text(describe_model(model))
                )
            print_table(table)
            return
    _list_offline(as_json)


@command.command("show")
@click.argument("source")
@click.option(
    "--concurrency",
    type=click.IntRange(1, 1 << 20),
    multiple=True,
    metavar="N",
    help="Memory for N sequences at a time; may be repeated.  [default: 1, 8, 64]",
)
@click.option(
    "--tokens",
    type=click.IntRange(1, 1 << 30),
    metavar="M",
    help="Tokens of each sequence, prompt and answer.  [default: 4096, or the model's context]",
)
@click.option("--json", "as_json", is_flag=True, help="Write the report as JSON.")
def show(source: str, concurrency: tuple[int, ...], tokens: int | None, as_json: bool) -> int:
    """Tell what a model is, what memory it takes and whether it runs here, without loading it.

    SOURCE is a name, a .gguf file, a directory or a hub id that was pulled. Under the name that the
    settings give a model it is shown as they have it served. Exits with 1 where the model does not
    run here.
    """
    services = _store()
    from meshserve.cli.model_report.report import CONCURRENCIES, build_report
    from meshserve.cli.model_report.table import print_report
    from services.runtime.modelfiles import locate

    with services.store_errors():
        cache_dir = services.model_cache()
        chosen = services.model_in_settings(source)
        report = build_report(
            locate(source if chosen is None else chosen.source, cache_dir),
            cache_dir=cache_dir,
            concurrencies=concurrency or CONCURRENCIES,
            tokens=tokens,
            settings=chosen,
        )
    if as_json:
        write_json(report, sys.stdout)
    else:
        print_report(report)
    return 0 if report["verdict"]["runs"] else EXIT_FAILED


def _list_offline(as_json: bool) -> None:
    services = _store()
    from services.runtime.modelfiles import CATALOGUE, ModelStoreError, locate

    rows: list[dict[str, str | None]] = []
    cache_dir = services.model_cache()
    with services.store_errors():
        for name, entry in CATALOGUE.items():
            try:
                path: str | None = str(locate(name, cache_dir))
            except ModelStoreError:
                path = None
            rows.append({"name": name, "summary": entry.summary, "path": path})
    if as_json:
        write_json(rows, sys.stdout)
        return
    table = Table.grid(padding=(0, 2))
    for row in rows:
        where = row["path"] or f"not here; meshserve models pull {row['name']}"
        table.add_row(
            *(Text(str(cell), overflow="fold") for cell in (row["name"], row["summary"], where))
        )
    print_table(table)


def _store() -> ModuleType:
    """The store of models, which comes with the services."""
    try:
        from meshserve.cli import services
    except ImportError as error:
        raise CommandError(
            f"the model store is not installed ({error})", "pip install 'meshserve[all]'"
        ) from None
    return services
