"""What every command writes with: answers on standard output, everything else on standard error."""

from __future__ import annotations

import os
import sys

from rich.console import Console
from rich.table import Table
from rich.text import Text

from meshserve.supervisor.logview import printable

PIPE_WIDTH = 4096


def stdout_console() -> Console:
    """For answers. Made anew for each command, so that it writes to the stream of that moment."""
    console = Console(highlight=False)
    if not console.is_terminal:  # whoever reads a pipe wants whole lines
        console.width = PIPE_WIDTH
    return console


def lasting_console() -> Console:
    """For a command that goes on when nobody reads its output any more."""

    class LastingConsole(Console):
        def on_broken_pipe(self) -> None:
            self.quiet = True
            discard_stdout()

    return LastingConsole(highlight=False)


def discard_stdout() -> None:
    """Sends what is still to be written nowhere, so that Python does not complain at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def stderr_console() -> Console:
    """For errors, progress and remarks."""
    return Console(stderr=True, highlight=False)


def print_table(table: Table) -> None:
    """Prints a table; what goes into a pipe has no blanks at the ends of its lines."""
    console = stdout_console()
    if console.is_terminal:
        console.print(table)
        return
    with console.capture() as capture:
        console.print(table)
    for line in capture.get().splitlines():
        sys.stdout.write(line.rstrip() + "\n")


def write_text(text: str, *, terminal: bool) -> None:
    """Writes a piece of an answer at once. On a terminal, control characters are made visible."""
    sys.stdout.write(printable(text) if terminal else text)
    sys.stdout.flush()


def print_error(message: str, way_out: str = "") -> None:
    """`error: MESSAGE` with the way out below it."""
    console = stderr_console()
    first, *rest = message.splitlines() or [""]
    console.print(Text.assemble(("error: ", "bold red"), printable(first)), soft_wrap=True)
    for line in rest:
        console.print(Text("       " + printable(line)), soft_wrap=True)
    if way_out:
        console.print(Text("       " + printable(way_out), style="dim"), soft_wrap=True)
