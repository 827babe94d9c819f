"""`meshserve models load`, `unload`, `sleep` and `wake`: what operators do to models."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import click
from rich.table import Table
from rich.text import Text

from meshserve.cli.connection import connection_options, make_connection
from meshserve.cli.exits import EXIT_FAILED
from meshserve.cli.jsonify import write_json
from meshserve.cli.output import print_table
from meshserve.client import Client
from meshserve.hosting import HostedModel

_STYLES = {"ready": "green", "sleeping": "yellow", "loading": "yellow", "draining": "yellow"}


def hosting_command(
    name: str, summary: str, act: Callable[[Client, str], HostedModel]
) -> click.Command:
    """A command that does something to one model and tells what became of it on each engine."""

    @click.command(name, help=summary)
    @click.argument("model")
    @click.option("--json", "as_json", is_flag=True, help="Write the outcome as JSON.")
    @connection_options
    def command(
        model: str,
        as_json: bool,
        target: str | None,
        api_key: str | None,
        timeout_s: float,
        tls: bool,
        tls_ca: Path | None,
    ) -> int:
        with make_connection(target, api_key, timeout_s, tls, tls_ca).client() as client:
            hosted = act(client, model)
        if as_json:
            write_json(hosted, sys.stdout)
        else:
            _print(hosted)
        return EXIT_FAILED if hosted.problems else 0

    return command


def print_engines(rows: Iterable[tuple[str, Text, int, str]]) -> None:
    """Print of each engine its address, what is there, the bytes of that, and what went wrong."""
    table = Table.grid(padding=(0, 2))
    for address, state, size_bytes, problem in rows:
        size = f"{size_bytes / 2**20:,.0f} MiB" if size_bytes else ""
        table.add_row(Text(address), state, Text(size), Text(problem, style="red"))
    print_table(table)


def _print(model: HostedModel) -> None:
    print_engines(
        (
            replica.address,
            Text(replica.state or "unknown", style=_STYLES.get(replica.state, "red")),
            replica.memory_bytes,
            replica.problem,
        )
        for replica in model.replicas
    )


def _act(name: str, summary: str) -> click.Command:
    return hosting_command(
        name, summary, lambda client, model: getattr(client.admin, f"{name}_model")(model)
    )


COMMANDS = (
    _act(
        "load",
        "Load MODEL, which the settings name, on every engine that may run it.\n\nEngines that "
        "start later load it too. Needs an operator's key; exits with 1 where an engine failed.",
    ),
    _act(
        "unload",
        "Unload MODEL from every engine.\n\nNew requests for it are refused; those in flight may "
        "end, within 30 s.",
    ),
    _act(
        "sleep",
        "Free the memory of MODEL, which nobody uses now.\n\nThe next request for it brings it "
        "back.",
    ),
    _act("wake", "Bring MODEL back from sleep before a request does."),
)
