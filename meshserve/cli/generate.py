"""`meshserve generate`: completes a prompt."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, cast

import click

from meshserve.cli.connection import connection_options, make_connection
from meshserve.cli.inputs import read_stdin
from meshserve.cli.jsonify import write_json
from meshserve.cli.sampling import request_options, sampling_flags
from meshserve.cli.streaming import write_footer, write_stream
from meshserve.options import GenerateOptions


@click.command("generate")
@click.argument("prompt")
@click.option("--json", "as_json", is_flag=True, help="Write the whole result as JSON.")
@click.option("--n", type=int, help="Number of completions; needs --json.")
@click.option("--logprobs", type=int, help="Alternatives shown per token; needs --json.")
@click.option("--echo", is_flag=True, help="Repeat the prompt before the completion.")
@click.option("--no-special-tokens", is_flag=True, help="Take the prompt exactly as it stands.")
@sampling_flags
@connection_options
def command(
    prompt: str,
    as_json: bool,
    n: int | None,
    logprobs: int | None,
    echo: bool,
    no_special_tokens: bool,
    target: str | None,
    api_key: str | None,
    timeout_s: float,
    tls: bool,
    tls_ca: Path | None,
    **flags: Any,
) -> None:
    """Complete PROMPT as it stands, without a chat template; `-` reads standard input."""
    if not as_json and (n is not None or logprobs is not None):
        raise click.UsageError("--n and --logprobs need --json")
    options = cast(GenerateOptions, request_options(flags))
    if n is not None:
        options["n"] = n
    if logprobs is not None:
        options["logprobs"] = logprobs
    if echo:
        options["echo"] = True
    if no_special_tokens:
        options["add_special_tokens"] = False
    connection = make_connection(target, api_key, timeout_s, tls, tls_ca)
    text = read_stdin() if prompt == "-" else prompt
    with connection.client() as client:
        if as_json:
            write_json(client.generate(text, **options), sys.stdout)
            return
        with client.stream_generate(text, **options) as stream:
            timing = write_stream(stream.iter_text())
            answer = stream.collect()
        write_footer(answer.usage, timing, cached=answer.cached, finish_reason=answer.finish_reason)
