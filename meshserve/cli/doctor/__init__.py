"""`meshserve doctor`: what is wrong, and what to do about it."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import click
from rich.text import Text

from meshserve.cli.connection import Connection, connection_options, make_connection
from meshserve.cli.doctor import mesh as running
from meshserve.cli.doctor.findings import Finding, State, ok, problem, warning
from meshserve.cli.exits import EXIT_FAILED, CommandError
from meshserve.cli.jsonify import write_json
from meshserve.cli.output import stdout_console
from meshserve.supervisor.logview import printable
from meshserve.supervisor.statedir import StateDir

STYLES = {State.OK: "green", State.WARNING: "yellow", State.PROBLEM: "bold red"}
WIDTH = max(map(len, State)) + 4


@click.command("doctor")
@click.option(
    "-c",
    "--config",
    type=click.Path(path_type=Path, dir_okay=False),
    envvar="MESHSERVE_CONFIG",
    metavar="FILE",
    help="YAML file of settings.  [env: MESHSERVE_CONFIG]",
)
@click.option("--json", "as_json", is_flag=True, help="Write what is found as JSON.")
@connection_options
def command(
    config: Path | None,
    as_json: bool,
    target: str | None,
    api_key: str | None,
    timeout_s: float,
    tls: bool,
    tls_ca: Path | None,
) -> int:
    """Say what is wrong with a mesh, its settings and this machine, and what to do about it.

    Looks at this machine, the settings and what they point to, and at the mesh that runs here. With
    --target only at the mesh behind that gateway. Exits with 1 when it has found a problem.
    """
    connection = make_connection(target, api_key, timeout_s, tls, tls_ca)
    sections = dict(asyncio.run(_look(config, target, connection)))
    if as_json:
        write_json(sections, sys.stdout)
    else:
        _print(sections)
    found = [finding.state for findings in sections.values() for finding in findings]
    return EXIT_FAILED if State.PROBLEM in found else 0


async def _look(
    config: Path | None, target: str | None, connection: Connection
) -> list[tuple[str, list[Finding]]]:
    state = StateDir.default()
    sections = []
    if target is None:
        sections += await _look_here(config, state)
    sections.append(("mesh", [each async for each in _mesh(target, connection, state)]))
    return sections


async def _look_here(config: Path | None, state: StateDir) -> list[tuple[str, list[Finding]]]:
    """This machine, the settings, and what they point to."""
    try:
        from meshserve.cli.doctor import configuration, machine, models, reach
        from meshserve.cli.services import read_settings
        from services.runtime.modelfiles import default_cache_dir
    except ImportError as error:
        text = f"this machine and the settings were not looked at, for no service is here ({error})"
        return [("machine", [warning(text, "pip install 'meshserve[all]', if a mesh is to run")])]
    try:
        settings = read_settings(config)
    except CommandError as error:
        lines = error.message.splitlines()
        return [("settings", [problem(line, error.way_out) for line in lines])]
    cache_dir = settings.model_cache or default_cache_dir()
    starting = not state.is_held()
    here = [
        *machine.packages(),
        *machine.processors(cache_dir),
        *machine.gpu(settings, cache_dir),
        *machine.memory(),
        *machine.open_files(),
        *machine.folders(cache_dir, state.path),
    ]
    configured = [
        ok(f"the settings of {config} are valid" if config else "the settings are valid"),
        *configuration.access(settings),
        *configuration.certificates(settings),
        *configuration.policies(settings),
        *models.models(settings, cache_dir, starting=starting),
        *(configuration.addresses(settings, config, state) if starting else ()),
    ]
    for look in (reach.valkey, reach.targets, reach.traces):
        configured += [finding async for finding in look(settings)]
    return [("machine", here), ("settings", configured)]


async def _mesh(
    target: str | None, connection: Connection, state: StateDir
) -> AsyncIterator[Finding]:
    if target is None:
        mesh = state.running_mesh()
        if mesh is None:
            yield ok("no mesh runs here; `meshserve up` starts one")
            return
        async for finding in running.services(mesh, state):
            yield finding
        if not mesh.ready:
            yield warning("the mesh has not become ready yet", "wait, or look at the logs")
    async for finding in running.gateway(connection):
        yield finding


def _print(sections: dict[str, list[Finding]]) -> None:
    console = stdout_console()
    for title, findings in sections.items():
        console.print(Text(f"{title.capitalize()}", style="bold"))
        for finding in findings:
            console.print(Text.assemble(*_lines(finding)), soft_wrap=True)
    counts = [
        f"{count} {name}{'s' if count > 1 else ''}"
        for name in (State.PROBLEM, State.WARNING)
        if (count := sum(each.state is name for found in sections.values() for each in found))
    ]
    console.print(Text(f"\n{' and '.join(counts)} found" if counts else "\nAll is well."))


def _lines(finding: Finding) -> Iterator[str | tuple[str, str]]:
    indent = "\n" + " " * WIDTH
    yield (f"  {finding.state:<{WIDTH - 2}}", STYLES[finding.state])
    yield indent.join(map(printable, finding.text.splitlines()))
    if finding.remedy:
        yield (indent + printable(finding.remedy), "dim")
