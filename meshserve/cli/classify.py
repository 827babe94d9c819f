"""`meshserve classify`: sorts texts into the classes of a model."""

from __future__ import annotations

import sys
from pathlib import Path

import click
from rich.table import Table
from rich.text import Text

from meshserve.cli.connection import connection_options, make_connection
from meshserve.cli.encoding import encoding_options, given_texts, truncation, write_usage
from meshserve.cli.jsonify import write_json
from meshserve.cli.output import print_table
from meshserve.supervisor.logview import printable


@click.command("classify")
@click.argument("texts", nargs=-1)
@click.option(
    "--top-k", type=int, default=1, show_default=True, help="Classes shown per text; 0 shows all."
)
@encoding_options
@connection_options
def command(
    texts: tuple[str, ...],
    top_k: int,
    model: str,
    truncate: bool,
    as_json: bool,
    target: str | None,
    api_key: str | None,
    timeout_s: float,
    tls: bool,
    tls_ca: Path | None,
) -> None:
    """Sort each of TEXTS, or each line of standard input, into the classes of a model."""
    given = given_texts(texts)
    with make_connection(target, api_key, timeout_s, tls, tls_ca).client() as client:
        answer = client.classify(given, model=model, top_k=top_k, truncation=truncation(truncate))
    if as_json:
        write_json(answer, sys.stdout)
        return
    table = Table.grid(padding=(0, 2))
    for text, classes in zip(given, answer, strict=True):
        for each in classes:
            table.add_row(Text(f"{each.score:.4f}"), Text(each.label), Text(printable(text)))
    print_table(table)
    write_usage(len(answer), answer.usage)
