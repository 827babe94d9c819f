"""`meshserve chat`: one answer, or a conversation."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from meshserve.cli.connection import connection_options, make_connection
from meshserve.cli.conversation import Conversation
from meshserve.cli.inputs import read_stdin
from meshserve.cli.sampling import request_options, sampling_flags
from meshserve.cli.streaming import write_footer, write_stream
from meshserve.types import Message


@click.command("chat")
@click.argument("message", required=False)
@click.option("-s", "--system", metavar="TEXT", help="Instructions before the conversation.")
@sampling_flags
@connection_options
def command(
    message: str | None,
    system: str | None,
    target: str | None,
    api_key: str | None,
    timeout_s: float,
    tls: bool,
    tls_ca: Path | None,
    **flags: Any,
) -> None:
    """Talk to a model.

    With MESSAGE (`-` reads it from standard input) the answer is written and that is all. Without,
    a conversation begins; /help lists what can be done in it.
    """
    options = request_options(flags)
    connection = make_connection(target, api_key, timeout_s, tls, tls_ca)
    if message is None and not sys.stdin.isatty():
        message = "-"
    if message == "-":
        message = read_stdin()
    with connection.client() as client:
        if message is None:
            Conversation(client, options, system).run()
            return
        messages = [Message("system", system)] if system else []
        messages.append(Message("user", message))
        with client.stream_chat(messages, **options) as stream:
            timing = write_stream(stream.iter_text())
            answer = stream.collect()
        write_footer(answer.usage, timing, cached=answer.cached, finish_reason=answer.finish_reason)
