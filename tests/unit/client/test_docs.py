"""docs/client.md and docs/cli.md say what is there."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import click
import pytest

import meshserve
from meshserve import AsyncClient, Client
from meshserve.cli import exits
from meshserve.cli.main import COMMANDS, cli
from meshserve.cli.sampling import OPTION_NAMES

DOCS = Path(__file__).parents[3] / "docs"


def test_every_exception_is_in_the_table_and_the_table_names_no_other() -> None:
    rows = re.findall(r"^\| `(\w+Error)` \|", (DOCS / "client.md").read_text(), re.MULTILINE)
    exported = {
        name
        for name in meshserve.__all__
        if inspect.isclass(getattr(meshserve, name))
        and issubclass(getattr(meshserve, name), meshserve.MeshServeError)
    }
    assert set(rows) == exported - {"MeshServeError"}


def test_every_call_is_in_the_table_and_both_clients_have_it() -> None:
    rows = re.findall(r"^\| `(\w+)\(", (DOCS / "client.md").read_text(), re.MULTILINE)
    for kind, closing in ((Client, "close"), (AsyncClient, "aclose")):
        public = {name for name in vars(kind) if not name.startswith("_")}
        assert public - {closing} == set(rows)


def test_every_python_example_compiles() -> None:
    examples = re.findall(r"```python\n(.*?)```", (DOCS / "client.md").read_text(), re.DOTALL)
    assert len(examples) >= 5
    for example in examples:
        body = "".join(f"    {line}\n" for line in example.splitlines())
        compile(f"async def example():\n{body}", "docs/client.md", "exec")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_its_options_are_described(name: str) -> None:
    text = (DOCS / "cli.md").read_text()
    assert f"## meshserve {name}" in text
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            long_name = next(option for option in parameter.opts if option.startswith("--"))
            assert f"`{long_name}" in text


def test_every_sampling_option_is_described() -> None:
    text = (DOCS / "cli.md").read_text()
    for name in OPTION_NAMES:
        assert f"`--{name.replace('_', '-')}`" in text


def test_every_exit_code_is_described() -> None:
    rows = re.findall(r"^\| (\d+) \|", (DOCS / "cli.md").read_text(), re.MULTILINE)
    codes = {value for name, value in vars(exits).items() if name.startswith("EXIT_")}
    assert {int(row) for row in rows} == codes | {0}
