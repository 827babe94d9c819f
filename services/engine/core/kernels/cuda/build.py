"""Compiles the CUDA kernels into one shared library; needs the standard library and nvcc.

The library holds machine code for the cards of ARCHITECTURES, and PTX that the driver compiles for
later ones. By hand: `python services/engine/core/kernels/cuda/build.py --help`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import sysconfig
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

# Ampere and Hopper; Ada and the smaller Amperes run what is compiled for sm_80.
ARCHITECTURES = ("80", "90a")
_PORTABLE = "80"
FLAGS = ("-std=c++20", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "--use_fast_math")
# Of the card's code no warning is passed over.
STRICT_FLAGS = ("-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra,-Werror")
_PREFIX = "libmeshserve_cuda-"


@dataclass(frozen=True, slots=True)
class Compiler:
    """An nvcc: its path, what it calls itself, and where its libraries are."""

    path: Path
    version: str

    @property
    def library_flags(self) -> tuple[str, ...]:
        """Where CUDA's own libraries are, in a toolkit or in wheels."""
        root = self.path.resolve().parent.parent
        found = [root / name for name in ("lib64", "lib") if (root / name).is_dir()]
        return tuple(f"-L{directory}" for directory in found[:1])


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a library is made from, which its name is derived from.

    architectures: as in nvcc's sm_80 and sm_90a, without "sm_".
    """

    sources: Path = SOURCES
    architectures: tuple[str, ...] = ARCHITECTURES
    extra_flags: tuple[str, ...] = ()

    @property
    def flags(self) -> tuple[str, ...]:
        """The flags that all sources share."""
        codes = [f"-gencode=arch=compute_{each},code=sm_{each}" for each in self.architectures]
        portable = f"-gencode=arch=compute_{_PORTABLE},code=compute_{_PORTABLE}"
        return (*FLAGS, *codes, portable, *self.extra_flags)

    @property
    def digest(self) -> str:
        """Of the sources and the flags: a library with another one is out of date."""
        return digest_of_sources(self.sources, (".cu", ".h"), self.flags)

    def find(self, directory: Path) -> list[Path]:
        """Libraries of this recipe in `directory`, by whatever compiler, the newest first."""
        return find_libraries(directory, _PREFIX, self.digest)

    def plan(self, compiler: Compiler) -> Plan:
        """How a compiler makes the library."""
        command = (str(compiler.path), *self.flags)
        sources = sorted(self.sources.glob("*.cu"))
        return Plan(
            prefix=_PREFIX,
            digest=self.digest,
            compiler=compiler.version,
            jobs=tuple(Job(source, command, source.stem) for source in sources),
            # The runtime within it: whichever torch has loaded, or none, is then no matter.
            link=(*command, *compiler.library_flags, "-cudart=static", "-shared"),
            apart="cuda-",
            way_out="see the whole of it with `python -m services.engine.core.kernels.cuda.build`, "
            "or try another compiler with CUDACXX=...",
        )


def recipe_for(capability: tuple[int, int] | None) -> Recipe:
    """The recipe whose library has machine code for cards of a compute capability, too.

    None: for those of ARCHITECTURES.
    """
    # Code for 8.0 runs on 8.6, too; from 8.9 on there are products of eight-bit floats.
    if capability is None or capability == (9, 0) or (8, 0) <= capability < (8, 9):
        return Recipe()
    return Recipe(architectures=(*ARCHITECTURES, f"{capability[0]}{capability[1]}"))


def find_compiler(environment: Mapping[str, str] = os.environ) -> Compiler:
    """Return $CUDACXX if it is set, else the nvcc of the PATH, of $CUDA_HOME, of /usr/local/cuda
    or of the wheels of this Python.

    Raises:
        BuildError: there is none, or it does not run.
    """
    chosen = environment.get("CUDACXX")
    wheels = Path(sysconfig.get_paths()["purelib"]) / "nvidia"
    roots = [Path(environment.get("CUDA_HOME", "/usr/local/cuda")), *sorted(wheels.glob("cu*"))]
    candidates = [
        shutil.which(chosen or "nvcc", path=environment.get("PATH")),
        *([] if chosen else [shutil.which(root / "bin" / "nvcc") for root in roots]),
    ]
    for path in filter(None, candidates):
        answer = run([path, "--version"])
        if answer.returncode == 0:
            return Compiler(_behind(Path(path)), answer.stdout.strip().rpartition("\n")[2])
    raise BuildError(
        f"there is no CUDA compiler: {chosen or 'nvcc'} "
        + ("does not run" if any(candidates) else "is not here"),
        "install the CUDA toolkit 12.8 or newer, or `pip install 'meshserve[nvcc]'`",
    )


def _behind(path: Path) -> Path:
    """The compiler itself, where `path` is a script that runs the one of a toolkit."""
    usual = Path("/usr/local/cuda/bin/nvcc")
    return usual if path.parent == Path("/usr/local/bin") and usual.exists() else path


def build(into: Path, recipe: Recipe | None = None, compiler: Compiler | None = None) -> Path:
    """Compile a library into the directory `into` unless it is there, as `build_once` does.

    Raises:
        BuildError: no compiler, a source that does not compile, a directory that cannot be written.
    """
    return build_once(into, (recipe or Recipe()).plan(compiler or find_compiler()))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: build by hand and say where the library is."""
    parser = argparse.ArgumentParser(description="Compile the CUDA kernels.")
    parser.add_argument("--into", type=Path, required=True, help="directory of the library")
    parser.add_argument("--source", type=Path, default=SOURCES, help="directory of the sources")
    parser.add_argument("--strict", action="store_true", help="warnings are errors")
    options = parser.parse_args(arguments)
    extra = STRICT_FLAGS if options.strict else ()
    return build_by_hand(lambda: build(options.into, Recipe(options.source, extra_flags=extra)))


if __name__ == "__main__":
    sys.exit(main())
