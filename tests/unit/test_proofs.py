"""docs/support.md says nothing that no test proves: what a test claims is there, and CI runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import proofs

HOOKS = "from tests.support.proofs import pytest_runtest_makereport\n"
TESTS = """
import pytest

@pytest.mark.proves("{case}", "GPTQ", "{steps}")
@pytest.mark.parametrize("steps", ["plain torch", "native kernels"])
@pytest.mark.parametrize("case", ["llama, tied", "qwen3-moe"])
def test_runs(case, steps):
    pass

@pytest.mark.proves("bert that classifies", "classification")
@pytest.mark.skipif(True, reason="what it needs is not here")
def test_is_skipped():
    pass
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "conftest.py").write_text(HOOKS)
    tests_of(tmp_path).write_text(TESTS)
    return tmp_path


def tests_of(project: Path) -> Path:
    """By a name that no other test's has: a process imports it once."""
    return project / f"test_of_{project.name}.py"


class Items:
    """What pytest has collected."""

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        self.items = [*items]


def collected(project: Path) -> list[pytest.Item]:
    items = Items()
    options = ["--collect-only", "-q", "-p", "no:cacheprovider", "--import-mode=importlib"]
    options += ["-o", "asyncio_default_fixture_loop_scope=function"]
    options.append(f"--rootdir={project}")
    assert pytest.main([*options, str(tests_of(project))], plugins=[items]) == 0
    return items.items


def test_a_test_proves_what_its_parameters_name(project: Path) -> None:
    found = [set(proofs.of_item(item)) for item in collected(project)]
    assert found[0] == {("llama", "GPTQ"), ("llama", "plain torch")}
    assert found[3] == {("qwen3-moe", "GPTQ"), ("qwen3-moe", "native kernels")}
    assert found[4] == {("bert", "classification")}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"GPTQ"', '"GTPQ"', "proves 'GTPQ' of 'llama, tied': there is none"),
        ('"classification"', '"GPTQ"', "proves 'GPTQ' of 'bert that classifies': there is none"),
        ('"qwen3-moe"', '"giraffe"', "of 'giraffe': there is none"),
        ("def test_runs", "@pytest.mark.gpu\ndef test_runs", "but not in CI"),
        ("def test_runs", "@pytest.mark.xfail\ndef test_runs", "but not in CI"),
    ],
)
def test_what_cannot_be_is_refused(project: Path, old: str, new: str, message: str) -> None:
    tests_of(project).write_text(TESTS.replace(old, new))
    items = collected(project)
    with pytest.raises(ValueError, match=message):
        [*map(list, map(proofs.of_item, items))]


@pytest.mark.parametrize("ci", [False, True], ids=["here", "in CI"])
def test_a_proof_that_is_skipped_fails_in_ci(project: Path, ci: bool) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "CI"}
    command = [sys.executable, "-m", "pytest", "-q", str(project), f"--rootdir={project}"]
    result = subprocess.run(
        command,
        cwd=proofs.ROOT,
        env=environment | ({"CI": "true"} if ci else {}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == (1 if ci else 0), result.stdout
    assert "4 passed" in result.stdout
    assert ("1 error" if ci else "1 skipped") in result.stdout
