"""The CUDA kernels compile for the cards they are for, keep to their registers, and load."""

from __future__ import annotations

import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from services.engine.core.compiling import BuildError
from services.engine.core.kernels.cuda import library
from services.engine.core.kernels.cuda.build import (
    ARCHITECTURES,
    SOURCES,
    STRICT_FLAGS,
    Compiler,
    Recipe,
    build,
    find_compiler,
    main,
    recipe_for,
)
from services.engine.core.kernels.cuda.library import Library, UnavailableError, find_or_build

KERNELS = sorted(SOURCES.glob("*.cu"))
RESOURCES = re.compile(
    r"Compiling entry function '(\w+)' for 'sm_(\w+)'.*?"
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads",
    re.DOTALL,
)


@pytest.fixture(scope="session")
def compiler() -> Compiler:
    try:
        return find_compiler()
    except BuildError as error:
        missing = f"{error.problem}: {error.way_out}"
    if os.environ.get("CI"):
        pytest.fail(missing)
    pytest.skip(missing)


@pytest.fixture(scope="module")
def compiled(
    compiler: Compiler, tmp_path_factory: pytest.TempPathFactory
) -> dict[Path, tuple[Path, str]]:
    """Of each source its object, for all architectures, and what the assembler said."""
    out = tmp_path_factory.mktemp("objects")
    flags = (*Recipe().flags, *STRICT_FLAGS, "-Xptxas=-v", "-c")

    def compile_one(source: Path) -> tuple[Path, str]:
        target = out / f"{source.stem}.o"
        command = [compiler.path, *flags, source, "-o", target]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return target, result.stderr

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return dict(zip(KERNELS, pool.map(compile_one, KERNELS), strict=True))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_no_kernel_spills_registers(compiled: dict[Path, tuple[Path, str]]) -> None:
    found = [use for _, said in compiled.values() for use in RESOURCES.findall(said)]
    assert {architecture for _, architecture, *_ in found} == set(ARCHITECTURES)
    assert [use for use in found if use[2:] != ("0", "0", "0")] == []


@pytest.mark.slow
def test_the_library_can_be_loaded_without_a_card(
    compiler: Compiler, compiled: dict[Path, tuple[Path, str]], tmp_path: Path
) -> None:
    path = tmp_path / "kernels.so"
    objects = [target for target, _ in compiled.values()]
    link = [compiler.path, *Recipe().flags, *compiler.library_flags, "-cudart=static", "-shared"]
    subprocess.run([*link, *objects, "-o", path], check=True)
    assert Library(path)._error_name(700) == b"cudaErrorIllegalAddress"


SMALL = 'extern "C" __attribute__((visibility("default"))) int answer() { return %d; }\n'


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    sources = tmp_path / "src"
    sources.mkdir()
    (sources / "small.cu").write_text(SMALL % 42)
    return Recipe(sources)


def test_a_library_is_compiled_once_and_again_when_its_sources_change(
    compiler: Compiler, recipe: Recipe, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    first = build(out, recipe, compiler)
    built_ns = first.stat().st_mtime_ns
    assert build(out, recipe, compiler) == first
    assert first.stat().st_mtime_ns == built_ns
    assert recipe.find(out) == [first]
    (recipe.sources / "small.cu").write_text(SMALL % 43)
    assert recipe.find(out) == []
    assert build(out, recipe, compiler) != first
    assert not list(out.rglob("*.partial"))


def test_what_does_not_compile_is_said_with_the_first_error(
    compiler: Compiler, recipe: Recipe, tmp_path: Path
) -> None:
    (recipe.sources / "small.cu").write_text("int answer() { return question; }\n")
    with pytest.raises(BuildError, match=r'small\.cu.*"question" is undefined'):
        build(tmp_path / "out", recipe, compiler)


def test_a_compiler_is_looked_for_and_what_brings_one_is_said(tmp_path: Path) -> None:
    with pytest.raises(BuildError) as raised:
        find_compiler({"CUDACXX": "no-such-compiler", "PATH": str(tmp_path)})
    assert "no-such-compiler is not here" in raised.value.problem
    assert "meshserve[nvcc]" in raised.value.way_out


def test_a_card_gets_code_of_its_own_where_that_has_more() -> None:
    assert recipe_for((9, 0)) == recipe_for((8, 6)) == recipe_for(None) == Recipe()
    assert recipe_for((8, 9)).architectures == (*ARCHITECTURES, "89")
    assert "-gencode=arch=compute_120,code=sm_120" in recipe_for((12, 0)).flags


def test_by_hand_it_says_where_the_library_is_or_what_is_wrong(
    compiler: Compiler, recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments = ["--into", str(tmp_path / "out"), "--source", str(recipe.sources), "--strict"]
    assert main(arguments) == 0
    assert "libmeshserve_cuda-" in capsys.readouterr().out
    (recipe.sources / "small.cu").write_text("static int unused() { return 1; }\n")
    assert main(arguments) == 1
    assert "unused" in capsys.readouterr().err


def test_a_file_that_is_no_library_is_a_plain_error(tmp_path: Path) -> None:
    (tmp_path / "broken.so").write_text("nothing")
    with pytest.raises(UnavailableError, match="remove it to have it compiled again"):
        Library(tmp_path / "broken.so")


def test_a_card_that_is_too_old_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(
        UnavailableError, match=r"need compute capability 8\.0, and the card has 7\.5"
    ):
        find_or_build((7, 5), tmp_path)


def test_without_a_compiler_an_image_runs_what_it_has(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def missing() -> Compiler:
        raise BuildError("there is no CUDA compiler", "install one")

    monkeypatch.setattr(library, "find_compiler", missing)
    monkeypatch.setattr(library, "PACKAGE", tmp_path / "package")
    with pytest.raises(UnavailableError, match="there is no CUDA compiler; install one"):
        find_or_build((8, 9), tmp_path)
    (tmp_path / "package").mkdir()
    usual = tmp_path / "package" / f"libmeshserve_cuda-{Recipe().digest}-0.so"
    usual.touch()
    assert find_or_build((9, 0), tmp_path) == usual
    # Another card runs the code for sm_80, or has its driver compile the PTX.
    assert find_or_build((8, 9), tmp_path) == usual
    (tmp_path / "kernels").mkdir()
    own = tmp_path / "kernels" / f"libmeshserve_cuda-{recipe_for((8, 9)).digest}-0.so"
    own.touch()
    assert find_or_build((8, 9), tmp_path) == own
