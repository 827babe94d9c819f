"""`meshserve score`: scores documents against a query."""

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


@click.command("score")
@click.argument("query")
@click.argument("documents", nargs=-1)
@encoding_options
@connection_options
def command(
    query: str,
    documents: tuple[str, ...],
    model: str,
    truncate: bool,
    as_json: bool,
    target: str | None,
    api_key: str | None,
    timeout_s: float,
    tls: bool,
    tls_ca: Path | None,
) -> None:
    """Score each of DOCUMENTS, or each line of standard input, against QUERY.

    Writes the documents with their scores, the best one first; --json keeps their order.
    """
    given = given_texts(documents)
    with make_connection(target, api_key, timeout_s, tls, tls_ca).client() as client:
        answer = client.score(query, given, model=model, truncation=truncation(truncate))
    if as_json:
        write_json(answer, sys.stdout)
        return
    table = Table.grid(padding=(0, 2))
    for index in answer.ranking:
        table.add_row(Text(f"{answer.scores[index]:.4f}"), Text(printable(given[index])))
    print_table(table)
    write_usage(len(answer), answer.usage)
