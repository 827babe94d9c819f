"""Choosing among the compiled kernels, and running without them where there are none."""

from __future__ import annotations

import ctypes
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from services.engine.core.kernels.cpu import build, library
from services.engine.core.kernels.cpu.library import Library, UnavailableError

START = """
import logging, sys
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(levelname)s %(message)s")
from services.engine.core.kernels import cpu, silu_and_mul, select
cpu.library.PACKAGE = cpu.library.Path(sys.argv[1])
print("kernels:", cpu.activate() and cpu.active().isa)
print("why not:", cpu.why_not())
select("cpu")
import torch
print(silu_and_mul(torch.ones(1, 4)).shape)
"""


@pytest.fixture
def path() -> Path:
    return library.find_or_build()


@pytest.fixture(autouse=True)
def whatever_was_active(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_active", library._active)
    monkeypatch.setattr(library, "_reason", library._reason)


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> dict[str, library.Check]:
    registered: dict[str, library.Check] = {}
    monkeypatch.setattr(library, "_CHECKS", registered)
    return registered


def processor_flags() -> set[str]:
    cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    return set(next(line for line in cpuinfo.splitlines() if line.startswith("flags")).split())


def test_the_instruction_sets_are_those_that_the_kernel_reports(path: Path) -> None:
    flags = processor_flags()
    avx2 = {"avx2", "fma", "f16c"}
    avx512 = avx2 | {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"}
    needed = {"avx2": avx2, "avx512": avx512}
    needed["avx512bf16"] = avx512 | {"avx512_bf16", "avx512vbmi"}
    needed["amx"] = needed["avx512bf16"] | {"amx_tile", "amx_int8", "amx_bf16"}
    has = [name for name in reversed(build.INSTRUCTION_SETS) if needed[name] <= flags]
    assert library.isa_names(path) == has


def test_each_instruction_set_hands_out_its_own_table(path: Path) -> None:
    for name in library.isa_names(path):
        kernels = library.load(path, name)
        assert kernels.isa == name
        assert kernels.table.isa == name.encode()
        assert kernels.table.size == ctypes.sizeof(library.KernelTable)


def test_an_unknown_instruction_set_is_a_plain_error(path: Path) -> None:
    with pytest.raises(UnavailableError, match="lacks avx10") as error:
        library.load(path, "avx10")
    assert "engine.cpu_kernels" in error.value.way_out


def test_auto_takes_the_best_and_says_so(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    chosen = library.activate()
    assert chosen is not None
    assert chosen is library.active()
    assert chosen.isa == library.isa_names(path)[0]
    assert library.why_not() is None
    (record,) = caplog.records
    assert record.getMessage().startswith(f"CPU kernels: {chosen.isa}")


def test_an_instruction_set_may_be_forced_and_the_kernels_switched_off(path: Path) -> None:
    for name in library.isa_names(path):
        chosen = library.activate(name)  # type: ignore[arg-type]
        assert chosen is not None
        assert chosen.isa == name
    assert library.activate("off") is None
    assert library.active() is None
    assert "engine.cpu_kernels" in (library.why_not() or "")


def test_what_computes_wrongly_is_passed_over(
    path: Path, checks: dict[str, library.Check], caplog: pytest.LogCaptureFixture
) -> None:
    names = library.isa_names(path)
    if len(names) < 2:
        pytest.skip("this machine has one instruction set alone")

    @library.check("sums")
    def sums(kernels: Library) -> bool:
        return kernels.isa != names[0]

    chosen = library.activate()
    assert chosen is not None
    assert chosen.isa == names[1]
    assert f"{names[0]} computes sums wrongly" in caplog.text


def test_when_all_compute_wrongly_plain_torch_runs(
    checks: dict[str, library.Check], caplog: pytest.LogCaptureFixture
) -> None:
    library.check("sums")(lambda kernels: False)
    assert library.activate() is None
    assert "running on plain torch" in caplog.text
    assert "computes correctly" in (library.why_not() or "")


def test_a_check_has_a_name_of_its_own(checks: dict[str, library.Check]) -> None:
    library.check("sums")(lambda kernels: True)
    with pytest.raises(ValueError, match="two checks"):
        library.check("sums")(lambda kernels: True)


def test_a_damaged_library_is_compiled_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = tmp_path / "package"
    installed.mkdir()
    (installed / library.find_or_build().name).write_bytes(b"not a library")
    monkeypatch.setattr(library, "PACKAGE", installed)
    monkeypatch.setattr(library, "build", lambda into, recipe: into / "built")
    assert library.find_or_build(tmp_path / "cache") == tmp_path / "cache" / "kernels" / "built"


def start_without(tmp_path: Path, **environment: str) -> str:
    """What an engine says at its start where no library is installed and none is cached."""
    result = subprocess.run(
        [sys.executable, "-c", START, str(tmp_path / "package")],
        env=os.environ | {"MESHSERVE_CACHE": str(tmp_path / "cache")} | environment,
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[4],
    )
    return result.stdout


def test_without_a_compiler_the_engine_runs_and_says_what_it_misses(tmp_path: Path) -> None:
    said = start_without(tmp_path, CXX="/nowhere/c++")
    assert "kernels: None" in said
    assert "WARNING CPU kernels: none, running on plain torch" in said
    assert "there is no C++ compiler" in said
    assert "apt-get install g++" in said
    assert "torch.Size([1, 2])" in said


def test_with_a_compiler_that_fails_the_engine_runs_too(tmp_path: Path) -> None:
    broken = tmp_path / "broken-c++"
    broken.write_text('#!/bin/sh\n[ "$1" = --version ] && echo broken 1.0 && exit 0\nexit 1\n')
    broken.chmod(0o755)
    said = start_without(tmp_path, CXX=str(broken))
    assert "kernels: None" in said
    assert "does not compile" in said


@pytest.mark.slow
def test_an_engine_that_finds_no_library_compiles_one_for_all_later_starts(tmp_path: Path) -> None:
    first = start_without(tmp_path)
    assert "compiling them into" in first
    assert "kernels: None" not in first
    again = start_without(tmp_path, CXX="/nowhere/c++")
    assert "compiling" not in again
    assert "kernels: None" not in again
