"""Reads prompts from standard input."""

from __future__ import annotations

import sys

from meshserve.cli.exits import EXIT_USAGE, CommandError


def read_stdin() -> str:
    """All of standard input, without the last line end. Raises CommandError for what is no text."""
    data = sys.stdin.buffer.read()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CommandError(
            f"standard input is not UTF-8 (byte {error.start})",
            "convert it first, for example with iconv",
            exit_code=EXIT_USAGE,
        ) from None
    return text.removesuffix("\n").removesuffix("\r")
