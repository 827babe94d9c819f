"""Who may import whom, how long a file may be, and that each says what it is for."""

from __future__ import annotations

import ast
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SERVICES = ("gateway", "tokenizer", "engine", "cache", "safety")
FOLDERS = ("services", "meshserve", "tests", "benchmarks", "docs", "deploy")
LONGEST_FILE = 600
LONG_FILE = 300
# services/engine/core runs on a bare GPU machine.
BARE_RUNTIME = ("services.runtime.modelfiles", "services.runtime.tokenizerfiles")
CORE_MAY_NOT_IMPORT = ("grpc", "asyncio", "opentelemetry", "prometheus_client", "meshserve")


def python_files(*folders: str) -> list[Path]:
    found = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    return sorted(
        path
        for path in [*found, *(ROOT.glob("*.py") if folders == FOLDERS else ())]
        if ROOT / "meshserve" / "v1" not in path.parents and "__pycache__" not in path.parts
    )


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def parents_of_nodes(tree: ast.AST) -> dict[ast.AST, ast.AST]:
    return {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}


def imports(path: Path, *, lazy: bool = True) -> Iterator[str]:
    """Every module that a file imports, in full; without `lazy` those outside functions alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    parents = parents_of_nodes(tree)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        if not lazy and _is_lazy(node, parents):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
            continue
        package = path.relative_to(ROOT).with_suffix("").parts[: -node.level or None]
        base = [*(package if node.level else ()), *((node.module,) if node.module else ())]
        yield from (".".join([*base, alias.name]) for alias in node.names)


def _is_lazy(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> bool:
    """Whether an import happens when a function runs, or for type checkers alone."""
    while node in parents:
        node = parents[node]
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            return True
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return True
    return False


def is_within(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_imports_the_runtime_the_stubs_and_itself(service: str) -> None:
    allowed = ("services.runtime", f"services.{service}", "meshserve.v1")
    wrong = [
        f"{name(path)} imports {module}"
        for path in python_files(f"services/{service}")
        for module in imports(path)
        if is_within(module, "services", "meshserve", "tests") and not is_within(module, *allowed)
    ]
    assert wrong == []


def test_the_runtime_imports_no_service() -> None:
    allowed = ("services.runtime", "meshserve.v1")
    wrong = [
        f"{name(path)} imports {module}"
        for path in python_files("services/runtime")
        for module in imports(path)
        if is_within(module, "services", "meshserve", "tests") and not is_within(module, *allowed)
    ]
    assert wrong == []


def test_the_engine_core_imports_neither_rpc_nor_telemetry() -> None:
    allowed = ("services.engine.core", *BARE_RUNTIME)
    wrong = [
        f"{name(path)} imports {module}"
        for path in python_files("services/engine/core")
        for module in imports(path)
        if is_within(module, *CORE_MAY_NOT_IMPORT)
        or (is_within(module, "services") and not is_within(module, *allowed))
    ]
    assert wrong == []


def test_what_the_engine_core_uses_of_the_runtime_is_as_bare() -> None:
    wrong = [
        f"{name(path)} imports {module}"
        for path in python_files(*(package.replace(".", "/") for package in BARE_RUNTIME))
        for module in imports(path)
        if is_within(module, *CORE_MAY_NOT_IMPORT)
        or (is_within(module, "services") and not is_within(module, *BARE_RUNTIME))
    ]
    assert wrong == []


def test_what_neither_computes_nor_reads_models_loads_no_numpy() -> None:
    """It takes six megabytes and 50 ms of a start in each process."""
    modules = [f"services.{each}.service" for each in SERVICES if each != "tokenizer"]
    script = f"import {', '.join(modules)}, meshserve.cli.services, sys; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    ).stdout.split()
    assert "services.runtime.modelfiles" in loaded
    assert not {"numpy", "torch"}.intersection(loaded)


def test_the_client_library_needs_no_service() -> None:
    tools = (ROOT / "meshserve" / "cli", ROOT / "meshserve" / "supervisor")
    wrong = [
        f"{name(path)} imports {module}"
        for path in python_files("meshserve")
        if not any(tool in path.parents for tool in tools) and path.name != "__main__.py"
        for module in imports(path)
        if is_within(module, "services", "tests", "meshserve.cli", "meshserve.supervisor")
    ]
    assert wrong == []


def test_the_command_line_starts_where_the_client_alone_is_installed() -> None:
    # What stands inside a function is imported when a command needs it.
    wrong = [
        f"{name(path)} imports {module}"
        for path in sorted(eagerly_imported(ROOT / "meshserve" / "cli" / "__init__.py"))
        for module in imports(path, lazy=False)
        if is_within(module, "services")
    ]
    assert wrong == []


def eagerly_imported(start: Path) -> set[Path]:
    """The files of the project that importing a file imports, itself included."""
    seen: set[Path] = set()
    waiting = [start]
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        for module in imports(path, lazy=False):
            parts = module.split(".")
            for end in range(1, len(parts) + 1):
                base = ROOT.joinpath(*parts[:end])
                candidates = (base.with_suffix(".py"), base / "__init__.py")
                waiting += [candidate for candidate in candidates if candidate.is_file()]
    return seen


def test_every_file_says_what_it_is_for() -> None:
    silent = [
        name(path)
        for path in python_files(*FOLDERS)
        if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert silent == []


def test_no_file_is_too_long() -> None:
    lengths = {
        name(path): len(path.read_text(encoding="utf-8").splitlines())
        for path in python_files(*FOLDERS)
    }
    long = {path: lines for path, lines in lengths.items() if lines > LONG_FILE}
    for path, lines in long.items():
        if not path.startswith("tests/") and lines <= LONGEST_FILE:
            warnings.warn(f"{path} has {lines} lines; is it one thing?", stacklevel=1)
    assert {path: lines for path, lines in long.items() if lines > LONGEST_FILE} == {}


def test_the_rules_see_what_they_forbid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    folder = tmp_path / "services" / "cache"
    folder.mkdir(parents=True)
    file = folder / "a.py"
    file.write_text(
        "from services.gateway import x\nimport grpc.aio\nfrom . import keys\n"
        "from ..engine.core import y\n"
        "def f():\n    import services.safety.policy\n"
    )
    assert list(imports(file)) == [
        "services.gateway.x",
        "grpc.aio",
        "services.cache.keys",
        "services.engine.core.y",
        "services.safety.policy",
    ]
    assert "services.safety.policy" not in list(imports(file, lazy=False))
