"""The `meshserve` command: finds the subcommand, and turns every failure into a line and a code."""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

import click

from meshserve.cli.exits import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    CommandError,
    command_error,
)
from meshserve.cli.output import discard_stdout, print_error
from meshserve.errors import MeshServeError
from meshserve.supervisor.statedir import StateDir

# Subcommand: module below meshserve.cli, and what `--help` says without importing it.
COMMANDS = {
    "up": "Start a mesh on this machine and serve until Ctrl-C.",
    "down": "Stop the mesh that runs on this machine.",
    "status": "Show the health of every service and the models.",
    "top": "Show what the whole mesh does, live.",
    "doctor": "Say what is wrong, and what to do about it.",
    "probe": "Ask one service whether it can do its work now.",
    "chat": "Talk to a model.",
    "generate": "Complete a prompt.",
    "embed": "Turn texts into vectors.",
    "classify": "Sort texts into the classes of a model.",
    "score": "Score documents against a query.",
    "models": "Pull, list, show, load and unload models.",
    "adapters": "List, load and unload adapters.",
    "quantize": "Write a model in 4 or 8 bits, and measure what it costs.",
}
CRASH_REPORT = "crash.txt"


class LazyGroup(click.Group):
    """Imports a subcommand when it is used: `chat` must not wait for what `up` needs."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = importlib.import_module(f"meshserve.cli.{cmd_name}").command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


def _version() -> str:
    try:
        return version("meshserve")
    except PackageNotFoundError:
        return "unknown"


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(_version(), prog_name="meshserve")
def cli() -> None:
    """LLM inference as a mesh of small gRPC services."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command line and exits. No failure ends in a traceback."""
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: Sequence[str]) -> int:
    """Runs a command line and returns its exit code."""
    try:
        result = cli.main(list(arguments), prog_name="meshserve", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except CommandError as error:
        print_error(error.message, error.way_out)
        return error.exit_code
    except MeshServeError as error:
        shown = command_error(error)
        print_error(shown.message, shown.way_out)
        return shown.exit_code
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.ClickException as error:
        hint = ""
        if isinstance(error, click.UsageError) and error.ctx is not None:
            hint = f"`{error.ctx.command_path} --help` shows how it is used"
        print_error(error.format_message(), hint)
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader has had enough, `head` for example. Python would complain once more at exit.
        discard_stdout()
        return EXIT_FAILED
    except Exception as error:
        print_error(f"unexpected {type(error).__name__}: {error}", _report_crash())
        return EXIT_FAILED


def _report_crash() -> str:
    """Keeps the traceback for whoever mends the defect, and says where."""
    try:
        path = StateDir.default().path / CRASH_REPORT
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(traceback.format_exc(), encoding="utf-8", errors="replace")
    except OSError:
        return "this is a defect of meshserve; please report it"
    return f"this is a defect of meshserve; please report it with {path}"
