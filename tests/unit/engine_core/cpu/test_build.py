"""Compiling the kernels: once, never a stale library, and a plain word where it cannot be done."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from services.engine.core.compiling import BuildError, build_once
from services.engine.core.kernels.cpu import build
from services.engine.core.kernels.cpu.build import Recipe

DISPATCH = 'extern "C" __attribute__((visibility("default"))) int answer() { return 42; }\n'
PER_SET = "namespace MESHSERVE_ISA { int unused() { return 1; } }\n"


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """Two small sources: one of the baseline, and one that is compiled per instruction set."""
    sources = tmp_path / "src"
    sources.mkdir()
    (sources / "dispatch.cpp").write_text(DISPATCH)
    (sources / "twice.cpp").write_text(PER_SET)
    (sources / "shared.h").write_text("#pragma once\n")
    return Recipe(sources)


def objects_of(into: Path) -> set[str]:
    return {path.name for path in (into / "objects").glob("*.o")}


def by_hand(recipe: Recipe, into: Path) -> list[str]:
    command = [sys.executable, build.__file__, "--into", str(into)]
    return [*command, "--source", str(recipe.sources)]


def test_a_library_is_compiled_once(recipe: Recipe, tmp_path: Path) -> None:
    first = build.build(tmp_path / "out", recipe)
    built_ns = first.stat().st_mtime_ns
    assert build.build(tmp_path / "out", recipe) == first
    assert first.stat().st_mtime_ns == built_ns
    assert recipe.find(tmp_path / "out") == [first]
    assert {name.rsplit("-", 1)[0] for name in objects_of(tmp_path / "out")} == {
        "dispatch-baseline",
        *(f"twice-{name}" for name in build.INSTRUCTION_SETS),
    }


def test_a_changed_source_makes_another_library_and_compiles_nothing_else(
    recipe: Recipe, tmp_path: Path
) -> None:
    old = build.build(tmp_path / "out", recipe)
    objects = objects_of(tmp_path / "out")
    (recipe.sources / "twice.cpp").write_text(PER_SET + "// changed\n")
    assert recipe.find(tmp_path / "out") == []
    new = build.build(tmp_path / "out", recipe)
    assert new != old
    changed = objects_of(tmp_path / "out")
    assert objects & changed == {n for n in objects if "dispatch" in n}
    assert len(changed) == len(objects)


def test_a_changed_header_or_flag_makes_another_library(recipe: Recipe) -> None:
    digest = recipe.digest
    assert Recipe(recipe.sources, ("-g",)).digest != digest
    (recipe.sources / "shared.h").write_text("#pragma once\n// changed\n")
    assert recipe.digest != digest


def test_processes_that_build_at_once_compile_once(recipe: Recipe, tmp_path: Path) -> None:
    counted = tmp_path / "counted"
    compiler = tmp_path / "counting-c++"
    real = build.find_compiler().command[0]
    compiler.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] || echo x >> {counted}\nexec {real} "$@"\n'
    )
    compiler.chmod(0o755)
    command = by_hand(recipe, tmp_path / "out")
    environment = os.environ | {"CXX": str(compiler)}
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True)
        for _ in range(2)
    ]
    answers = {process.communicate()[0].split()[0] for process in running}
    assert [process.returncode for process in running] == [0, 0]
    assert len(answers) == 1
    # One source of the baseline, another per instruction set, and the link.
    assert len(counted.read_text().splitlines()) == 1 + len(build.INSTRUCTION_SETS) + 1


def test_no_compiler_is_a_plain_error() -> None:
    with pytest.raises(BuildError) as error:
        build.find_compiler({"PATH": "/nowhere"})
    assert "no C++ compiler" in error.value.problem
    assert "apt-get install g++" in error.value.way_out
    with pytest.raises(BuildError, match="does not run"):
        build.find_compiler({"PATH": os.environ["PATH"], "CXX": "/nowhere/c++"})
    with pytest.raises(BuildError, match="does not run"):
        build.find_compiler({"PATH": os.environ["PATH"], "CXX": "false"})


def test_the_compiler_may_be_chosen_and_bring_arguments() -> None:
    usual = build.find_compiler().command[0]
    wrapped = build.find_compiler({"PATH": os.environ["PATH"], "CXX": f"env {usual} -g0"})
    assert wrapped.command == ("env", usual, "-g0")


def test_a_source_that_does_not_compile_is_named_with_the_first_error(
    recipe: Recipe, tmp_path: Path
) -> None:
    (recipe.sources / "twice.cpp").write_text("int broken( { return 1; }\n")
    with pytest.raises(BuildError, match=r"twice\.cpp.*error"):
        build.build(tmp_path / "out", recipe)
    assert recipe.find(tmp_path / "out") == []
    (recipe.sources / "twice.cpp").write_text(PER_SET)
    assert build.build(tmp_path / "out", recipe).exists()


def test_a_directory_that_cannot_be_written_is_a_plain_error(
    recipe: Recipe, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BuildError, match="cannot be compiled into") as error:
        build.build(tmp_path / "file" / "out", recipe)
    assert "MESHSERVE_CACHE" in error.value.way_out


def test_another_processor_is_not_promised_anything() -> None:
    build.check_machine("x86_64")
    with pytest.raises(BuildError, match="aarch64"):
        build.check_machine("aarch64")


def test_what_others_compile_into_the_same_directory_is_left_alone(
    recipe: Recipe, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    theirs = out / "libmeshserve_cuda-1.7.partial"
    theirs.touch()
    ours = out / "libmeshserve_cpu-1.7.partial"
    ours.touch()
    build.build(out, recipe)
    assert theirs.exists()
    assert not ours.exists()


def test_it_is_compiled_before_anything_is_installed(recipe: Recipe, tmp_path: Path) -> None:
    """With the standard library alone, and of the project the two files that an image copies."""
    package = tmp_path / "services" / "engine" / "core"
    package.mkdir(parents=True)
    shutil.copy(sys.modules[build_once.__module__].__file__ or "", package)
    shutil.copy(build.__file__, tmp_path)
    command = [sys.executable, "-S", str(tmp_path / "build.py"), *by_hand(recipe, tmp_path)[2:]]
    found = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    assert "libmeshserve_cpu-" in found.stdout


def test_libraries_of_old_sources_are_removed_in_time(recipe: Recipe, tmp_path: Path) -> None:
    for version in range(8):
        (recipe.sources / "shared.h").write_text(f"#pragma once\n// {version}\n")
        latest = build.build(tmp_path / "out", recipe)
    left = list((tmp_path / "out").glob("*.so"))
    assert latest in left
    assert len(left) <= 5


def test_the_command_says_where_the_library_is(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = by_hand(recipe, tmp_path / "out")[2:]
    assert build.main(arguments) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'out'}/libmeshserve_cpu-")
    (recipe.sources / "twice.cpp").write_text("int f() { int unused; return 1; }\n")
    assert build.main([*arguments, "--strict"]) == 1
    assert "unused" in capsys.readouterr().err


def test_an_interrupted_build_leaves_nothing_that_could_be_loaded(
    recipe: Recipe, tmp_path: Path
) -> None:
    # A file lock goes with its process, and only whole files get their names.
    out = tmp_path / "out"
    started = threading.Event()
    slow = tmp_path / "slow-c++"
    real = build.find_compiler().command[0]
    slow.write_text(f'#!/bin/sh\n[ "$1" = --version ] || sleep 30\nexec {real} "$@"\n')
    slow.chmod(0o755)
    process = subprocess.Popen(
        by_hand(recipe, out),
        env=os.environ | {"CXX": str(slow)},
        start_new_session=True,
    )
    while not (out / "objects").exists():
        started.wait(0.05)
    os.killpg(process.pid, 9)
    process.wait()
    assert recipe.find(out) == []
    library = build.build(out, recipe)
    assert library.exists()
    shutil.rmtree(out)
