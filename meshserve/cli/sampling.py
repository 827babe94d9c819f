"""Flags that become options of a request, shared by `chat` and `generate`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import click

from meshserve.cli.exits import EXIT_USAGE, CommandError
from meshserve.options import RequestOptions

F = TypeVar("F", bound=Callable[..., Any])

_FLAGS: tuple[tuple[tuple[str, ...], dict[str, Any]], ...] = (
    (("-m", "--model"), {"metavar": "NAME", "help": "Model.  [default: the server's]"}),
    (("-n", "--max-tokens"), {"type": int, "help": "Largest number of tokens."}),
    (("--min-tokens",), {"type": int, "help": "Do not end before this many tokens."}),
    (("-t", "--temperature"), {"type": float, "help": "0 always takes the likeliest token."}),
    (("--top-p",), {"type": float, "help": "Smallest set of tokens that sums up to this."}),
    (("--top-k",), {"type": int, "help": "This many of the likeliest tokens."}),
    (("--min-p",), {"type": float, "help": "Least share of the likeliest token."}),
    (("--seed",), {"type": int, "help": "Makes sampling repeatable."}),
    (("--repetition-penalty",), {"type": float, "help": "Above 1, less of what was seen."}),
    (("--presence-penalty",), {"type": float, "help": "Less of what the answer holds."}),
    (("--frequency-penalty",), {"type": float, "help": "The same, for each occurrence."}),
    (("--stop",), {"multiple": True, "help": "Text that ends the answer; may be repeated."}),
    (("--ignore-eos",), {"is_flag": True, "help": "Go on after the model's own end."}),
    (("--json-schema",), {"metavar": "FILE", "help": "The answer is JSON of this schema."}),
    (("--regex",), {"help": "The answer matches this."}),
    (("--choice",), {"multiple": True, "help": "One of the possible answers; repeat it."}),
    (("--grammar",), {"metavar": "FILE", "help": "The answer follows this grammar in EBNF."}),
    (("--no-cache",), {"is_flag": True, "help": "Keep away from the response cache."}),
    (("--priority",), {"type": int, "help": "Higher runs first; in [-100, 100]."}),
    (("--request-id",), {"help": "Names the request in logs and traces."}),
    (("--adapter",), {"help": "Name of a loaded adapter."}),
)
OPTION_NAMES = tuple(names[-1].removeprefix("--").replace("-", "_") for names, _ in _FLAGS)


def sampling_flags(command: F) -> F:
    """Adds the flags to a command, which takes them as keyword arguments."""
    for names, settings in reversed(_FLAGS):
        command = click.option(*names, **settings)(command)
    return command


def request_options(flags: Mapping[str, Any]) -> RequestOptions:
    """The flags that were given, as options of a request. Raises CommandError."""
    options = {name: flags[name] for name in OPTION_NAMES if _was_given(flags.get(name))}
    if options.pop("no_cache", False):
        options["cache"] = False
    if "json_schema" in options:
        options["json_schema"] = _read(options["json_schema"])
    if "grammar" in options:
        options["grammar"] = _read(options["grammar"])
    for name in ("stop", "choice"):
        if name in options:
            options[name] = list(options[name])
    return cast(RequestOptions, options)


def _was_given(value: object) -> bool:
    return not (value is None or value is False or value == ())


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        # Who gives the text itself is told what is asked for.
        way_out = "give the path of a file that holds it" if "{" in path or "\n" in path else ""
        raise CommandError(
            f"{path} cannot be read: {reason}", way_out, exit_code=EXIT_USAGE
        ) from None
