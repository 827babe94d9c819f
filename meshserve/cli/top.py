"""`meshserve top`: the whole mesh, live."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from contextlib import aclosing
from pathlib import Path

import click
from rich.console import Console
from rich.live import Live

from meshserve import errors
from meshserve.cli.connection import Connection, connection_options, make_connection
from meshserve.cli.jsonify import write_json
from meshserve.cli.output import PIPE_WIDTH, stdout_console
from meshserve.cli.top_feed import plain, watch
from meshserve.cli.top_format import ASCII, UNICODE, Glyphs
from meshserve.cli.top_screen import VIEWS, Screen
from meshserve.supervisor.keyboard import key_presses
from meshserve.v1 import mesh_pb2

RECONNECT_INTERVAL_S = 1.0
MIN_INTERVAL_S = 0.25
MAX_INTERVAL_S = 60.0
# A report on its own is about this much time at least.
REPORT_WINDOW_MS = 1900
# How wide a report into a pipe is.
REPORT_WIDTH = 160
# A failure of these passes; all others are told at once.
_PASSING = (errors.ServiceUnavailableError, errors.DeadlineExceededError)


@click.command("top")
@click.option(
    "--interval",
    "interval_s",
    type=click.FloatRange(MIN_INTERVAL_S, MAX_INTERVAL_S),
    default=1.0,
    show_default=True,
    metavar="SECONDS",
    help="Time between two pictures.",
)
@click.option(
    "--view", type=click.Choice(list(VIEWS)), default="replicas", help="What to begin with."
)
@click.option("--once", is_flag=True, help="Write one report and leave.")
@click.option(
    "--json", "as_json", is_flag=True, help="Write JSON, a document a line; with --once one."
)
@connection_options
def command(
    interval_s: float,
    view: str,
    once: bool,
    as_json: bool,
    target: str | None,
    api_key: str | None,
    timeout_s: float,
    tls: bool,
    tls_ca: Path | None,
) -> int:
    """Show what the whole mesh does, live.

    Services and their replicas, engines, models and tenants, with rates and latencies over the last
    ten seconds. Needs an operator's key where the gateway asks for keys. Where standard output is
    no terminal a report is written once.
    """
    connection = make_connection(target, api_key, timeout_s, tls, tls_ca)
    console = stdout_console()
    if as_json and not once:
        asyncio.run(_write_lines(connection, interval_s))
    elif as_json:
        write_json(plain(asyncio.run(_first_measured(connection, interval_s))), sys.stdout)
    elif once or not console.is_terminal:
        _report(console, connection, asyncio.run(_first_measured(connection, interval_s)))
    else:
        screen = Screen(connection.target, interval_s, _glyphs(console), view)
        asyncio.run(_show(console, connection, screen))
    return 0


async def _first_measured(connection: Connection, interval_s: float) -> mesh_pb2.MeshSnapshot:
    """The first picture whose rates cover some time."""
    try:
        async with asyncio.timeout(connection.timeout_s):
            async with aclosing(watch(connection, interval_s)) as pictures:
                async for mesh in pictures:
                    if mesh.window_ms >= REPORT_WINDOW_MS:
                        return mesh
    except TimeoutError:
        raise errors.DeadlineExceededError("no report within the timeout") from None
    raise errors.ServiceUnavailableError("the gateway ended the stream")


async def _write_lines(connection: Connection, interval_s: float) -> None:
    async with aclosing(watch(connection, interval_s)) as pictures:
        async for mesh in pictures:
            sys.stdout.write(json.dumps(plain(mesh), ensure_ascii=False) + "\n")
            sys.stdout.flush()


def _report(console: Console, connection: Connection, mesh: mesh_pb2.MeshSnapshot) -> None:
    screen = Screen(connection.target, 0, _glyphs(console))
    screen.take(mesh)
    width = REPORT_WIDTH if console.width == PIPE_WIDTH else console.width
    console.print(screen.report(width))


async def _show(console: Console, connection: Connection, screen: Screen) -> None:
    """Shows the screen until `q` or Ctrl-C. Raises MeshServeError if the first picture cannot be
    had, or if the gateway lets us in no more."""
    changed = asyncio.Event()

    def press(key: str) -> None:
        screen.press(key)
        changed.set()

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGWINCH, changed.set)
    feeding = asyncio.create_task(_feed(connection, screen, changed))
    feeding.add_done_callback(lambda _: changed.set())
    try:
        with key_presses(press), Live(console=console, screen=True, auto_refresh=False) as live:
            while not screen.is_done and not feeding.done():
                changed.clear()
                live.update(screen.render(console.width, console.height), refresh=True)
                await changed.wait()
        if feeding.done():
            await feeding
    finally:
        feeding.cancel()
        await asyncio.gather(feeding, return_exceptions=True)


async def _feed(connection: Connection, screen: Screen, changed: asyncio.Event) -> None:
    """Gives pictures to the screen, also after the gateway was away for a while."""
    has_begun = False
    while True:
        try:
            async with aclosing(watch(connection, screen.interval_s)) as pictures:
                async for mesh in pictures:
                    has_begun = True
                    screen.take(mesh)
                    changed.set()
        except _PASSING:
            if not has_begun:
                raise
            screen.problem = "the gateway is away; trying again"
        changed.set()
        await asyncio.sleep(RECONNECT_INTERVAL_S)


def _glyphs(console: Console) -> Glyphs:
    return ASCII if console.options.ascii_only else UNICODE
