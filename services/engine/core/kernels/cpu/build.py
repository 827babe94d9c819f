"""Compiles the C++ kernels into one shared library; needs the standard library and a compiler.

Every source in src/ is compiled once per instruction set, into a namespace of its own, and
those of BASELINE_SOURCES once for any x86-64. `src/dispatch.cpp` chooses between them when the
library is loaded. By hand: `python services/engine/core/kernels/cpu/build.py --help`.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from services.engine.core.compiling import (
    BuildError,
    Job,
    Plan,
    build_by_hand,
    build_once,
    digest_of_sources,
    find_libraries,
    run,
)

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
        how = self.flags, INSTRUCTION_SETS, BASELINE_SOURCES
        return digest_of_sources(self.sources, (".cpp", ".h"), how)

    def find(self, directory: Path) -> list[Path]:
        """Libraries of this recipe in `directory`, by whatever compiler, the newest first."""
        return find_libraries(directory, _PREFIX, self.digest)

    def plan(self, compiler: Compiler) -> Plan:
        """How a compiler makes the library."""
        # In this order, from the narrowest instruction set to the widest: of an inline function
        # that several objects define the linker keeps the first, which must run on all machines on
        # which any of its callers does.
        baseline = [self.sources / name for name in BASELINE_SOURCES]
        jobs = [self._job(compiler, source, "baseline", ()) for source in baseline]
        others = [each for each in sorted(self.sources.glob("*.cpp")) if each not in baseline]
        for name, flags in INSTRUCTION_SETS.items():
            own = (*flags, f"-DMESHSERVE_ISA={name}", f'-DMESHSERVE_ISA_NAME="{name}"')
            jobs += [self._job(compiler, source, name, own) for source in others]
        return Plan(
            prefix=_PREFIX,
            digest=self.digest,
            compiler=compiler.version,
            jobs=tuple(jobs),
            link=(*compiler.command, "-shared", "-pthread", *self.extra_flags),
            apart="",
            way_out="see the whole of it with `python -m services.engine.core.kernels.cpu.build`, "
            "or try another compiler with CXX=...",
        )

    def _job(
        self, compiler: Compiler, source: Path, variant: str, own_flags: tuple[str, ...]
    ) -> Job:
        command = (*compiler.command, *self.flags, *own_flags)
        return Job(source, command, f"{source.stem}-{variant}")


def find_compiler(environment: Mapping[str, str] = os.environ) -> Compiler:
    """Return $CXX if it is set, else g++ or clang++.

    Raises:
        BuildError: none of them is here, or $CXX does not run.
    """
    chosen = environment.get("CXX")
    for command in [shlex.split(chosen)] if chosen else [[name] for name in _COMPILERS]:
        if not command or shutil.which(command[0], path=environment.get("PATH")) is None:
            continue
        answer = run([*command, "--version"])
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
    """Compile a library into the directory `into` unless it is there, as `build_once` does.

    Raises:
        BuildError: no compiler, a source that does not compile, a directory that cannot be written.
    """
    check_machine()
    return build_once(into, (recipe or Recipe()).plan(compiler or find_compiler()))


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
    return build_by_hand(lambda: build(options.into, Recipe(options.source, extra)))


if __name__ == "__main__":
    sys.exit(main())
