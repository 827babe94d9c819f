"""A scripted gateway, an empty state directory, and a way to run command lines."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from meshserve.cli.main import run
from tests.fakes.scripted_gateway import ScriptedGateway


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


@pytest.fixture
def gateway() -> Iterator[ScriptedGateway]:
    server = ScriptedGateway()
    yield server
    server.stop()


@pytest.fixture(autouse=True)
def clean_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MESHSERVE_TARGET", "MESHSERVE_API_KEY", "MESHSERVE_TLS_CA", "MESHSERVE_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MESHSERVE_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("MESHSERVE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def meshserve(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Result]:
    """Runs a command line as a shell would, and never lets a traceback through."""

    def run_line(*arguments: str, stdin: bytes = b"") -> Result:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        code = run(arguments)
        out, err = capfd.readouterr()
        assert "Traceback" not in out + err
        return Result(code, out, err)

    return run_line
