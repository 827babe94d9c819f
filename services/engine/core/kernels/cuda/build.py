"""Compiles the CUDA kernels into one shared library; needs the standard library and nvcc.

The library holds machine code for the cards of ARCHITECTURES, and PTX that the driver compiles for
later ones. Its name holds a digest of all that went into it, so that one that is out of date is
never loaded. By hand: `python services/engine/core/kernels/cuda/build.py --help`.

It stands alone, as the one of the CPU kernels does: both run before anything is installed.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).parent
SOURCES = PACKAGE / "src"

# Ampere and Hopper; Ada and the smaller Amperes run what is compiled for sm_80.
ARCHITECTURES = ("80", "90a")
_PORTABLE = "80"
FLAGS = ("-std=c++20", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "--use_fast_math")
# Of the card's code no warning is passed over.
STRICT_FLAGS = ("-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra,-Werror")
_PREFIX = "libmeshserve_cuda-"
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
        files = sorted(path for path in self.sources.iterdir() if path.suffix in (".cu", ".h"))
        parts = [repr(self.flags).encode()]
        for path in files:
            parts += [path.name.encode(), path.read_bytes()]
        return _digest(parts)

    def find(self, directory: Path) -> list[Path]:
        """Libraries of this recipe in `directory`, by whatever compiler, the newest first."""
        found = directory.glob(f"{_PREFIX}{self.digest}-*.so")
        return sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)


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
        answer = _run([path, "--version"])
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
    """Compile a library into the directory `into` unless it is there; return its path.

    Several processes may do so at once: one compiles and the others wait for it. Objects are kept
    in `into`/cuda-objects, and compiled again when a source, a header or a flag has changed.

    Raises:
        BuildError: no compiler, a source that does not compile, a directory that cannot be written.
    """
    recipe = recipe or Recipe()
    compiler = compiler or find_compiler()
    library = into / f"{_PREFIX}{recipe.digest}-{_digest([compiler.version.encode()], 8)}.so"
    if library.exists():
        return library
    try:
        into.mkdir(parents=True, exist_ok=True)
        with (into / "cuda-lock").open("w") as lock:
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
    objects = library.parent / "cuda-objects"
    objects.mkdir(exist_ok=True)
    for interrupted in (*objects.glob("*.partial"), *library.parent.glob(f"{_PREFIX}*.partial")):
        interrupted.unlink(missing_ok=True)
    command = [str(compiler.path), *recipe.flags]

    def key_of(source: Path) -> str:
        headers = [path.read_bytes() for path in sorted(recipe.sources.glob("*.h"))]
        return _digest(
            [repr(command).encode(), compiler.version.encode(), source.read_bytes(), *headers]
        )

    def compile_one(source: Path) -> Path:
        key = key_of(source)
        target = objects / f"{source.stem}-{key}.o"
        if not target.exists():
            partial = target.with_suffix(f".{os.getpid()}.partial")
            _check(_run([*command, "-c", str(source), "-o", str(partial)]), source.name)
            if key_of(source) != key:
                partial.unlink(missing_ok=True)
                raise BuildError(f"{source.name} was edited while it was compiled", "build again")
            partial.rename(target)
        for older in objects.glob(f"{source.stem}-*.o"):
            if older != target and older.stem.rpartition("-")[0] == source.stem:
                older.unlink(missing_ok=True)
        return target

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        try:
            compiled = list(pool.map(compile_one, sorted(recipe.sources.glob("*.cu"))))
        except BuildError:
            pool.shutdown(cancel_futures=True)
            raise
    partial = library.with_suffix(f".{os.getpid()}.partial")
    # The runtime within it: whichever torch has loaded, or none, is then no matter.
    link = [*command, *compiler.library_flags, "-cudart=static", "-shared", *map(str, compiled)]
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
    output = f"{result.stdout}{result.stderr}"
    lines = output.strip().splitlines() or [f"exit status {result.returncode}"]
    first = next((line for line in lines if "error" in line), lines[0])
    raise BuildError(
        f"{result.args[0]} does not compile {what}: {first}",
        "see the whole of it with `python -m services.engine.core.kernels.cuda.build`, or try "
        "another compiler with CUDACXX=...",
        output,
    )


def _digest(parts: Sequence[bytes], length: int = 16) -> str:
    joined = hashlib.sha256()
    for part in parts:
        joined.update(len(part).to_bytes(8, "little") + part)
    return joined.hexdigest()[:length]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: build by hand and say where the library is."""
    parser = argparse.ArgumentParser(description="Compile the CUDA kernels.")
    parser.add_argument("--into", type=Path, required=True, help="directory of the library")
    parser.add_argument("--source", type=Path, default=SOURCES, help="directory of the sources")
    parser.add_argument("--strict", action="store_true", help="warnings are errors")
    options = parser.parse_args(arguments)
    started_s = time.monotonic()
    try:
        extra = STRICT_FLAGS if options.strict else ()
        library = build(options.into, Recipe(options.source, extra_flags=extra))
    except BuildError as error:
        # The whole of it is the developer's; elsewhere the first error is enough.
        sys.stderr.write(f"{error.output}{error.problem}\n{error.way_out}\n")
        return 1
    sys.stdout.write(f"{library} ({time.monotonic() - started_s:.1f} s)\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
