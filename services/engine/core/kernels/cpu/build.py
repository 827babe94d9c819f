"""Compiles the C++ kernels into one shared library; needs the standard library and a compiler.

Every source in src/ is compiled once per instruction set, into a namespace of its own, and
those of BASELINE_SOURCES once for any x86-64. `src/dispatch.cpp` chooses between them when the
library is loaded. A library's name holds a digest of all that went into it, so that one that is
out of date is never loaded. By hand: `python services/engine/core/kernels/cpu/build.py --help`.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).parent
SOURCES = PACKAGE / "src"

_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni")
_AVX512BF16 = (*_AVX512, "-mavx512bf16", "-mavx512vbmi")
# From the narrowest to the widest: each runs wherever a later one does.
INSTRUCTION_SETS: dict[str, tuple[str, ...]] = {
    "avx2": _AVX2,
    "avx512": _AVX512,
    "avx512bf16": _AVX512BF16,
    "amx": (*_AVX512BF16, "-mamx-tile", "-mamx-int8", "-mamx-bf16"),
}
BASELINE_SOURCES = ("dispatch.cpp",)
# No contraction: where two operations become one fused one must not depend on how the compiler
# unrolled a loop, or a token's logits would depend on its place in the batch. Not -march=native:
# a wheel or an image built elsewhere has to run here.
FLAGS = (
    "-std=c++20",
    "-O3",
    "-fPIC",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fvisibility=hidden",
)
# For the compiler's eyes alone: little optimisation, every warning an error. GCC takes its own
# intrinsics for uses of what was never set.
STRICT_FLAGS = (
    "-O1",
    "-Wall",
    "-Wextra",
    "-Wpedantic",
    "-Wshadow",
    "-Werror",
    "-Wno-unknown-warning-option",
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
)
SANITIZER_FLAGS = (
    "-O1",
    "-g",
    "-fno-omit-frame-pointer",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=undefined",
)
_COMPILERS = ("g++", "clang++")
_PREFIX = "libmeshserve_cpu-"
# Libraries of earlier sources that are kept: other checkouts and releases share the cache.
_KEPT_LIBRARIES = 4


class BuildError(Exception):
    """The kernels cannot be compiled here. `way_out` says what to do about it.

    `output` is what the compiler wrote, if it was one that failed.
    """

    def __init__(self, problem: str, way_out: str, output: str = "") -> None:
        super().__init__(problem)
        self.problem = problem
        self.way_out = way_out
        self.output = output


@dataclass(frozen=True, slots=True)
class Compiler:
    """A C++ compiler: the command that runs it, and what it calls itself."""

    command: tuple[str, ...]
    version: str


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a library is made from, which its name is derived from."""

    sources: Path = SOURCES
    extra_flags: tuple[str, ...] = ()

    @property
    def flags(self) -> tuple[str, ...]:
        """The flags that all sources share."""
        return (*FLAGS, *self.extra_flags)

    @property
    def digest(self) -> str:
        """Of the sources and the flags: a library with another one is out of date."""
        files = sorted(path for path in self.sources.iterdir() if path.suffix in (".cpp", ".h"))
        parts = [repr((self.flags, INSTRUCTION_SETS, BASELINE_SOURCES)).encode()]
        for path in files:
            parts += [path.name.encode(), path.read_bytes()]
        return _digest(parts)

    def find(self, directory: Path) -> list[Path]:
        """Libraries of this recipe in `directory`, by whatever compiler, the newest first."""
        found = directory.glob(f"{_PREFIX}{self.digest}-*.so")
        return sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)


def find_compiler(environment: Mapping[str, str] = os.environ) -> Compiler:
    """Return $CXX if it is set, else g++ or clang++.

    Raises:
        BuildError: none of them is here, or $CXX does not run.
    """
    chosen = environment.get("CXX")
    for command in [shlex.split(chosen)] if chosen else [[name] for name in _COMPILERS]:
        if not command or shutil.which(command[0], path=environment.get("PATH")) is None:
            continue
        answer = _run([*command, "--version"])
        if answer.returncode == 0:
            return Compiler(tuple(command), answer.stdout.partition("\n")[0])
    tried = f"$CXX is {chosen!r}, which" if chosen else f"none of {', '.join(_COMPILERS)}"
    raise BuildError(
        f"there is no C++ compiler: {tried} {'does not run' if chosen else 'is here'}",
        "install g++ 11 or clang++ 14, or newer (Debian and Ubuntu: apt-get install g++)",
    )


def check_machine(machine: str = "") -> None:
    """Raise BuildError on a machine whose processor the kernels are not written for."""
    machine = machine or platform.machine()
    if machine not in ("x86_64", "AMD64") or sys.platform != "linux":
        raise BuildError(
            f"the kernels are written for x86-64 on Linux, and this is {machine} on {sys.platform}",
            "nothing is to be done yet",
        )


def build(into: Path, recipe: Recipe | None = None, compiler: Compiler | None = None) -> Path:
    """Compile a library into the directory `into` unless it is there; return its path.

    Several processes may do so at once: one compiles and the others wait for it. Objects are kept
    in `into`/objects, and compiled again when a source, a header or a flag has changed.

    Raises:
        BuildError: no compiler, a source that does not compile, a directory that cannot be written.
    """
    check_machine()
    recipe = recipe or Recipe()
    compiler = compiler or find_compiler()
    library = into / f"{_PREFIX}{recipe.digest}-{_digest([compiler.version.encode()], 8)}.so"
    if library.exists():
        return library
    try:
        into.mkdir(parents=True, exist_ok=True)
        with (into / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not library.exists():
                _compile_and_link(library, recipe, compiler)
                _remove_old_libraries(library)
    except OSError as error:
        raise BuildError(
            f"the kernels cannot be compiled into {into}: {error}",
            "set MESHSERVE_CACHE to a directory that can be written",
        ) from None
    return library


def _compile_and_link(library: Path, recipe: Recipe, compiler: Compiler) -> None:
    objects = library.parent / "objects"
    objects.mkdir(exist_ok=True)
    for interrupted in (*objects.glob("*.partial"), *library.parent.glob("*.partial")):
        interrupted.unlink(missing_ok=True)
    sources = sorted(recipe.sources.glob("*.cpp"))
    jobs: list[tuple[Path, str, tuple[str, ...]]] = [
        (source, "baseline", ()) for source in sources if source.name in BASELINE_SOURCES
    ]
    for name, flags in INSTRUCTION_SETS.items():
        define = (f"-DMESHSERVE_ISA={name}", f'-DMESHSERVE_ISA_NAME="{name}"')
        jobs += [
            (source, name, (*flags, *define))
            for source in sources
            if source.name not in BASELINE_SOURCES
        ]

    def key_of(source: Path, command: Sequence[str]) -> str:
        headers = [path.read_bytes() for path in sorted(recipe.sources.glob("*.h"))]
        return _digest(
            [repr(command).encode(), compiler.version.encode(), source.read_bytes(), *headers]
        )

    def compile_one(job: tuple[Path, str, tuple[str, ...]]) -> Path:
        source, variant, own_flags = job
        command = [*compiler.command, *recipe.flags, *own_flags]
        key = key_of(source, command)
        target = objects / f"{source.stem}-{variant}-{key}.o"
        if not target.exists():
            partial = target.with_suffix(f".{os.getpid()}.partial")
            _check(_run([*command, "-c", str(source), "-o", str(partial)]), source.name)
            if key_of(source, command) != key:
                partial.unlink(missing_ok=True)
                raise BuildError(f"{source.name} was edited while it was compiled", "build again")
            partial.rename(target)
        for older in objects.glob(f"{source.stem}-{variant}-*.o"):
            if older != target:
                older.unlink(missing_ok=True)
        return target

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        # In this order, from the narrowest instruction set to the widest: of an inline function
        # that several objects define the linker keeps the first, which must run on all machines
        # on which any of its callers does.
        try:
            compiled = list(pool.map(compile_one, jobs))
        except BuildError:
            pool.shutdown(cancel_futures=True)
            raise
    partial = library.with_suffix(f".{os.getpid()}.partial")
    link = [*compiler.command, "-shared", *recipe.extra_flags, *map(str, compiled), "-pthread"]
    _check(_run([*link, "-o", str(partial)]), library.name)
    partial.rename(library)


def _remove_old_libraries(library: Path) -> None:
    others = [path for path in library.parent.glob(f"{_PREFIX}*.so") if path != library]
    others.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    for path in others[_KEPT_LIBRARIES:]:
        path.unlink(missing_ok=True)


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    # The compiler is the user's own choice, and it is no shell that reads the command.
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace")
    except OSError as error:
        return subprocess.CompletedProcess(list(command), 127, "", str(error))


def _check(result: subprocess.CompletedProcess[str], what: str) -> None:
    if result.returncode == 0:
        return
    lines = result.stderr.strip().splitlines() or [f"exit status {result.returncode}"]
    first = next((line for line in lines if "error" in line), lines[0])
    raise BuildError(
        f"{result.args[0]} does not compile {what}: {first}",
        "see the whole of it with `python -m services.engine.core.kernels.cpu.build`, or try "
        "another compiler with CXX=...",
        result.stderr,
    )


def _digest(parts: Sequence[bytes], length: int = 16) -> str:
    joined = hashlib.sha256()
    for part in parts:
        joined.update(len(part).to_bytes(8, "little") + part)
    return joined.hexdigest()[:length]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: build by hand and say where the library is."""
    parser = argparse.ArgumentParser(description="Compile the C++ kernels of the CPU.")
    parser.add_argument("--into", type=Path, default=PACKAGE, help="directory of the library")
    parser.add_argument("--source", type=Path, default=SOURCES, help="directory of the sources")
    parser.add_argument("--strict", action="store_true", help="warnings are errors")
    parser.add_argument(
        "--sanitize", action="store_true", help="with AddressSanitizer and UBSan, for a test run"
    )
    options = parser.parse_args(arguments)
    extra = (SANITIZER_FLAGS if options.sanitize else ()) + (STRICT_FLAGS if options.strict else ())
    started_s = time.monotonic()
    try:
        library = build(options.into, Recipe(options.source, extra))
    except BuildError as error:
        # The whole of it is the developer's; elsewhere the first error is enough.
        sys.stderr.write(f"{error.output}{error.problem}\n{error.way_out}\n")
        return 1
    sys.stdout.write(f"{library} ({time.monotonic() - started_s:.1f} s)\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
