"""An installation carries what it needs and no more: one extra for each service."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from functools import cache
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SERVICES = ("gateway", "tokenizer", "engine", "cache", "safety")
# What others look for and do without: grpc for its own add-ons, OpenTelemetry for psutil.
OPTIONAL = {"grpcio-tools", "grpcio-reflection", "grpcio-health-checking", "psutil"}

LIST_IMPORTS = """
import sys
before = set(sys.modules)
import {module}
print("\\n".join({{name.partition(".")[0] for name in set(sys.modules) - before}}))
"""


def name_of(requirement: str) -> str:
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match is not None
    return re.sub(r"[-_.]+", "-", match.group()).lower()


def extras_of(requirement: str) -> list[str]:
    match = re.match(r"meshserve\[([^\]]+)\]", requirement)
    return match.group(1).split(",") if match else []


@cache
def declared(extra: str | None) -> frozenset[str]:
    """Distributions that an extra names, those of the extras it includes among them."""
    lines = PROJECT["dependencies"] + (PROJECT["optional-dependencies"][extra] if extra else [])
    found = {name_of(line) for line in lines if not extras_of(line)}
    for line in lines:
        for included in extras_of(line):
            found |= declared(included)
    return frozenset(found)


@cache
def installed_with(distribution: str) -> frozenset[str]:
    """A distribution and all that it requires, whatever the machine."""
    seen: set[str] = set()
    pending = [distribution]
    while pending:
        name = pending.pop()
        if name in seen:
            continue
        seen.add(name)
        try:
            lines = requires(name) or []
        except PackageNotFoundError:
            continue
        pending += [name_of(line) for line in lines if "extra ==" not in line]
    return frozenset(seen)


def imported_by(module: str) -> set[str]:
    """Distributions whose packages a module pulls in, in a process of its own."""
    result = subprocess.run(
        [sys.executable, "-c", LIST_IMPORTS.format(module=module)],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    owners = packages_distributions()
    return {
        name_of(owner)
        for package in result.stdout.split()
        for owner in owners.get(package, [])
        if name_of(owner) != "meshserve"
    }


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_imports_only_what_its_extra_installs(service: str) -> None:
    allowed = frozenset().union(*(installed_with(name) for name in declared(service)))
    assert imported_by(f"services.{service}.service") - allowed - OPTIONAL == set()


def test_the_client_needs_nothing_of_the_services() -> None:
    allowed = frozenset().union(*(installed_with(name) for name in declared(None)))
    assert imported_by("meshserve") - allowed - OPTIONAL == set()
    assert imported_by("meshserve.cli") - allowed - OPTIONAL == set()


@pytest.mark.parametrize("service", [name for name in SERVICES if name != "engine"])
def test_torch_belongs_to_the_engine_alone(service: str) -> None:
    assert "torch" not in frozenset().union(*(installed_with(name) for name in declared(service)))
    assert "torch" not in imported_by(f"services.{service}.service")


def test_every_dependency_is_pinned() -> None:
    pinned = {
        name_of(line)
        for line in (ROOT / "requirements.lock").read_text().splitlines()
        if "==" in line
    }
    wanted = {name for extra in (None, "all", "dev") for name in declared(extra)}
    assert wanted - pinned == set()


@pytest.mark.slow
def test_a_wheel_holds_the_generated_stubs_and_the_compiled_kernels(tmp_path: Path) -> None:
    import zipfile

    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(tmp_path), "."],
        check=True,
        cwd=ROOT,
    )
    (wheel,) = tmp_path.glob("meshserve-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    protos = [path.stem for path in (ROOT / "protos" / "meshserve" / "v1").glob("*.proto")]
    for stem in protos:
        for suffix in ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py", "_pb2_grpc.pyi"):
            assert f"meshserve/v1/{stem}{suffix}" in names
    assert "services/safety/policies/default.yaml" in names
    assert "services/gateway/console/pages/index.html" in names
    assert "meshserve/py.typed" in names
    assert not any(name.startswith("tests/") for name in names)
    # The kernels, and what an engine needs to compile them where the library does not fit.
    kernels = "services/engine/core/kernels/cpu"
    assert f"{kernels}/src/dispatch.cpp" in names
    assert f"{kernels}/src/kernels.h" in names
    assert "services/engine/core/kernels/cuda/src/ptx.h" in names
    compiled = [name for name in names if name.endswith(".so")]
    if shutil.which("g++") or shutil.which("clang++") or os.environ.get("CXX"):
        assert [name.startswith(f"{kernels}/libmeshserve_cpu-") for name in compiled] == [True]
        assert wheel.name.endswith("-py3-none-linux_x86_64.whl")
    else:
        assert compiled == []
        assert wheel.name.endswith("-py3-none-any.whl")
    assert not any(name.endswith(".o") for name in names)
