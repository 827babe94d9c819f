"""What the commands that ask encoders share: their texts and their options."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import click

from meshserve.cli.exits import EXIT_USAGE, CommandError
from meshserve.cli.inputs import read_stdin
from meshserve.cli.output import stderr_console
from meshserve.types import Usage

F = TypeVar("F", bound=Callable[..., Any])


def encoding_options(command: F) -> F:
    """Adds --model, --truncate and --json to a command."""
    decorators = [
        click.option(
            "-m",
            "--model",
            default="",
            metavar="NAME",
            help="Model to ask.  [default: the first that can do it]",
        ),
        click.option(
            "--truncate",
            is_flag=True,
            help="Cut the end off texts that do not fit, instead of refusing them.",
        ),
        click.option("--json", "as_json", is_flag=True, help="Write the whole result as JSON."),
    ]
    for decorate in reversed(decorators):
        command = decorate(command)
    return command


def truncation(truncate: bool) -> Literal["drop_newest"] | None:
    """The option of the request behind --truncate."""
    return "drop_newest" if truncate else None


def given_texts(arguments: Sequence[str]) -> list[str]:
    """The arguments, or the lines of standard input where there are none; empty lines are left out.
    Raises CommandError where there is no text at all."""
    if arguments:
        return list(arguments)
    if sys.stdin.isatty():
        stderr_console().print("[dim]Texts, one a line; Ctrl-D ends.[/]")
    texts = [line for line in read_stdin().splitlines() if line]
    if not texts:
        raise CommandError(
            "there is no text", "give texts as arguments, or one a line", exit_code=EXIT_USAGE
        )
    return texts


def write_usage(inputs: int, usage: Usage, *, cached: int = 0) -> None:
    """What it cost, on standard error where that is a terminal."""
    console = stderr_console()
    if console.is_terminal:
        from_cache = f", {cached} from the cache" if cached else ""
        console.print(f"[dim]{inputs} inputs, {usage.prompt_tokens} tokens{from_cache}[/]")
