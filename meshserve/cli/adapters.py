"""`meshserve adapters`: list, load and unload adapters on the engines of a mesh."""

from __future__ import annotations

import sys
from pathlib import Path

import click
from rich.table import Table
from rich.text import Text

from meshserve.cli.connection import connection_options, make_connection
from meshserve.cli.exits import EXIT_FAILED
from meshserve.cli.hosting import print_engines
from meshserve.cli.jsonify import write_json
from meshserve.cli.output import print_table
from meshserve.hosting import AdapterReplica


@click.group("adapters")
def command() -> None:
    """List, load and unload LoRA adapters. Needs an operator's key."""


@command.command("list")
@click.option("-m", "--model", default="", metavar="NAME", help="Of one model.  [default: of all]")
@click.option("--json", "as_json", is_flag=True, help="Write the list as JSON.")
@connection_options
def list_adapters(
    model: str,
    as_json: bool,
    target: str | None,
    api_key: str | None,
    timeout_s: float,
    tls: bool,
    tls_ca: Path | None,
) -> None:
    """List adapters, their models, and how many engines have them."""
    with make_connection(target, api_key, timeout_s, tls, tls_ca).client() as client:
        adapters = client.admin.adapters(model)
    if as_json:
        write_json(adapters, sys.stdout)
        return
    table = Table.grid(padding=(0, 2))
    for each in adapters:
        loaded = sum(replica.loaded for replica in each.replicas)
        whole = loaded == len(each.replicas)
        table.add_row(
            Text(each.name),
            Text(each.model),
            Text(f"on {loaded} of {len(each.replicas)}", style="green" if whole else "yellow"),
            Text(each.source or "declared in the settings"),
            Text("; ".join(each.problems), style="red"),
        )
    print_table(table)


@command.command("load")
@click.argument("name")
@click.argument("source")
@click.option("-m", "--model", default="", metavar="NAME", help="Base.  [default: the server's]")
@click.option("--json", "as_json", is_flag=True, help="Write the outcome as JSON.")
@connection_options
def load(
    name: str,
    source: str,
    model: str,
    as_json: bool,
    target: str | None,
    api_key: str | None,
    timeout_s: float,
    tls: bool,
    tls_ca: Path | None,
) -> int:
    """Load an adapter on every engine of its model, for requests that name it NAME.

    SOURCE is a path on the engines' machines or a hub id. What has the name already is replaced
    once the new one is there. Exits with 1 where an engine failed.
    """
    with make_connection(target, api_key, timeout_s, tls, tls_ca).client() as client:
        adapter = client.admin.load_adapter(name, source, model=model)
    if as_json:
        write_json(adapter, sys.stdout)
    else:
        _print(adapter.replicas)
    return EXIT_FAILED if adapter.problems else 0


@command.command("unload")
@click.argument("name")
@click.option("-m", "--model", default="", metavar="NAME", help="Base.  [default: whose it is]")
@click.option("--json", "as_json", is_flag=True, help="Write the outcome as JSON.")
@connection_options
def unload(
    name: str,
    model: str,
    as_json: bool,
    target: str | None,
    api_key: str | None,
    timeout_s: float,
    tls: bool,
    tls_ca: Path | None,
) -> int:
    """Unload the adapter NAME from every engine once the requests that use it have ended."""
    with make_connection(target, api_key, timeout_s, tls, tls_ca).client() as client:
        replicas = client.admin.unload_adapter(name, model=model)
    if as_json:
        write_json(replicas, sys.stdout)
    else:
        _print(replicas)
    return EXIT_FAILED if any(each.problem for each in replicas) else 0


def _print(replicas: tuple[AdapterReplica, ...] | list[AdapterReplica]) -> None:
    print_engines(
        (
            replica.address,
            Text("loaded", style="green") if replica.loaded else Text("not loaded", style="yellow"),
            replica.size_bytes,
            replica.problem,
        )
        for replica in replicas
    )
