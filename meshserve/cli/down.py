"""`meshserve down`: stops the mesh of this machine."""

from __future__ import annotations

import contextlib
import os
import signal
import time

import click

from meshserve.cli.exits import EXIT_FAILED, CommandError
from meshserve.cli.output import stdout_console
from meshserve.supervisor.statedir import StateDir

POLL_S = 0.05
DEFAULT_TIMEOUT_S = 90.0


@click.command("down")
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(min=0, min_open=True),
    default=DEFAULT_TIMEOUT_S,
    show_default=True,
    metavar="SECONDS",
    help="How long requests in flight may take before everything is killed.",
)
@click.option("--now", is_flag=True, help="Kill at once; requests in flight are lost.")
def command(timeout_s: float, now: bool) -> None:
    """Stop the mesh that runs on this machine. Where none runs, that is no error."""
    state = StateDir.default()
    console = stdout_console()
    if not state.is_held():
        console.print("No mesh is running.")
        return
    mesh = state.running_mesh()
    if mesh is None:
        raise CommandError(
            f"a mesh is starting, but has not written {state.path}/state.json yet",
            "try again in a moment",
        )
    try:
        os.kill(mesh.pid, signal.SIGTERM)
        if now:
            os.kill(mesh.pid, signal.SIGTERM)
    except ProcessLookupError:
        pass  # it ended by itself just now
    except PermissionError:
        raise CommandError(f"process {mesh.pid} belongs to somebody else") from None
    if not _wait_until_released(state, timeout_s):
        # A second signal makes the supervisor kill what is left.
        with contextlib.suppress(ProcessLookupError):
            os.kill(mesh.pid, signal.SIGTERM)
        if not _wait_until_released(state, 10.0):
            raise CommandError(
                f"process {mesh.pid} does not end", f"kill -9 {mesh.pid}", exit_code=EXIT_FAILED
            )
        console.print("The mesh was killed: it took too long to stop.")
        return
    console.print("The mesh has stopped.")


def _wait_until_released(state: StateDir, timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while state.is_held():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
    return True
