"""`meshserve embed`: turns texts into vectors."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Literal

import click

from meshserve.cli.connection import connection_options, make_connection
from meshserve.cli.encoding import encoding_options, given_texts, truncation, write_usage
from meshserve.cli.jsonify import write_json


@click.command("embed")
@click.argument("texts", nargs=-1)
@click.option("--dimensions", type=int, metavar="N", help="Keep the first N components.")
@click.option(
    "--pooling",
    type=click.Choice(["mean", "first", "last"]),
    help="How the vectors of tokens become one.  [default: the model's own]",
)
@click.option(
    "--normalize/--no-normalize",
    default=None,
    help="Whether vectors have length 1.  [default: the model's own]",
)
@click.option("--no-cache", is_flag=True, help="Keep away from the response cache.")
@encoding_options
@connection_options
def command(
    texts: tuple[str, ...],
    dimensions: int | None,
    pooling: Literal["mean", "first", "last"] | None,
    normalize: bool | None,
    no_cache: bool,
    model: str,
    truncate: bool,
    as_json: bool,
    target: str | None,
    api_key: str | None,
    timeout_s: float,
    tls: bool,
    tls_ca: Path | None,
) -> None:
    """Turn each of TEXTS, or each line of standard input, into a vector.

    Writes one JSON list of numbers a line, in the order of the texts.
    """
    given = given_texts(texts)
    with make_connection(target, api_key, timeout_s, tls, tls_ca).client() as client:
        answer = client.embed(
            given,
            model=model,
            dimensions=dimensions,
            pooling=pooling,
            normalize=normalize,
            truncation=truncation(truncate),
            cache=not no_cache,
        )
    if as_json:
        write_json(answer, sys.stdout)
        return
    for vector in answer:
        # So many digits tell any float32 from the next.
        sys.stdout.write(json.dumps([float(f"{value:.9g}") for value in vector]) + "\n")
    write_usage(len(answer), answer.usage, cached=answer.cached)
