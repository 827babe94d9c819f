"""Compiles sources into a shared library: once, whoever asks; needs the standard library alone.

A library's name holds a digest of all that went into it, so that one that is out of date is never
loaded. The kernels of a CPU and of a GPU are made like this, before anything is installed.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

# Libraries of earlier sources that are kept: other checkouts and releases share the cache.
_KEPT_LIBRARIES = 4


class BuildError(Exception):
    """A library cannot be compiled here. `way_out` says what to do about it.

    `output` is what the compiler wrote, if it was one that failed.
    """

    def __init__(self, problem: str, way_out: str, output: str = "") -> None:
        super().__init__(problem)
        self.problem = problem
        self.way_out = way_out
        self.output = output


@dataclass(frozen=True, slots=True)
class Job:
    """An object to compile.

    command: all but the source and the object. name: of the object, before its digest.
    """

    source: Path
    command: tuple[str, ...]
    name: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What a library is made of, and how.

    Attributes:
        prefix: of the names of its libraries, older ones too.
        digest: of what goes into it.
        compiler: what the compiler calls itself.
        jobs: its objects, in the order in which they are linked.
        link: the command, all but the objects and the library.
        apart: what the names of the lock and of the folder of objects begin with: others may be
            compiled into the same directory.
        way_out: from a source that does not compile.
    """

    prefix: str
    digest: str
    compiler: str
    jobs: tuple[Job, ...]
    link: tuple[str, ...]
    apart: str
    way_out: str


def digest_of(parts: Sequence[bytes], length: int = 16) -> str:
    """Return so many hexadecimal digits that tell these apart from any others."""
    joined = hashlib.sha256()
    for part in parts:
        joined.update(len(part).to_bytes(8, "little") + part)
    return joined.hexdigest()[:length]


def digest_of_sources(sources: Path, suffixes: Sequence[str], flags: object) -> str:
    """Return the digest of the files of a directory and of how they are compiled."""
    parts = [repr(flags).encode()]
    for path in sorted(path for path in sources.iterdir() if path.suffix in suffixes):
        parts += [path.name.encode(), path.read_bytes()]
    return digest_of(parts)


def find_libraries(directory: Path, prefix: str, digest: str) -> list[Path]:
    """Return those with a digest in `directory`, by whatever compiler, the newest first."""
    return _newest_first(directory, f"{prefix}{digest}-*.so")


def build_once(into: Path, plan: Plan) -> Path:
    """Compile a library into the directory `into` unless it is there; return its path.

    Several processes may do so at once: one compiles and the others wait for it. Objects are kept,
    and compiled again when their source, a header beside it or their command has changed.

    Raises:
        BuildError: a source that does not compile, a directory that cannot be written.
    """
    library = into / f"{plan.prefix}{plan.digest}-{digest_of([plan.compiler.encode()], 8)}.so"
    if library.exists():
        return library
    try:
        into.mkdir(parents=True, exist_ok=True)
        with (into / f"{plan.apart}lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not library.exists():
                _compile_and_link(library, plan)
                for older in _newest_first(into, f"{plan.prefix}*.so")[1 + _KEPT_LIBRARIES :]:
                    older.unlink(missing_ok=True)
    except OSError as error:
        raise BuildError(
            f"the kernels cannot be compiled into {into}: {error}",
            "set MESHSERVE_CACHE to a directory that can be written",
        ) from None
    return library


def _compile_and_link(library: Path, plan: Plan) -> None:
    objects = library.parent / f"{plan.apart}objects"
    objects.mkdir(exist_ok=True)
    interrupted = (*objects.glob("*.partial"), *library.parent.glob(f"{plan.prefix}*.partial"))
    for path in interrupted:
        path.unlink(missing_ok=True)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        try:
            compiled = list(pool.map(lambda job: _compile(job, objects, plan), plan.jobs))
        except BuildError:
            pool.shutdown(cancel_futures=True)
            raise
    partial = library.with_suffix(f".{os.getpid()}.partial")
    _check(run([*plan.link, *map(str, compiled), "-o", str(partial)]), library.name, plan)
    partial.rename(library)


def _compile(job: Job, objects: Path, plan: Plan) -> Path:
    key = _key(job, plan)
    target = objects / f"{job.name}-{key}.o"
    if not target.exists():
        partial = target.with_suffix(f".{os.getpid()}.partial")
        command = [*job.command, "-c", str(job.source), "-o", str(partial)]
        _check(run(command), job.source.name, plan)
        if _key(job, plan) != key:
            partial.unlink(missing_ok=True)
            raise BuildError(f"{job.source.name} was edited while it was compiled", "build again")
        partial.rename(target)
    for older in objects.glob(f"{job.name}-*.o"):
        if older != target and older.stem.rpartition("-")[0] == job.name:
            older.unlink(missing_ok=True)
    return target


def _key(job: Job, plan: Plan) -> str:
    headers = [path.read_bytes() for path in sorted(job.source.parent.glob("*.h"))]
    how = [repr(list(job.command)).encode(), plan.compiler.encode()]
    return digest_of([*how, job.source.read_bytes(), *headers])


def _newest_first(directory: Path, pattern: str) -> list[Path]:
    return sorted(directory.glob(pattern), key=lambda path: path.stat().st_mtime, reverse=True)


def run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; the status is 127 where there is none such."""
    # The compiler is the user's own choice, and it is no shell that reads the command.
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace")
    except OSError as error:
        return subprocess.CompletedProcess(list(command), 127, "", str(error))


def _check(result: subprocess.CompletedProcess[str], what: str, plan: Plan) -> None:
    if result.returncode == 0:
        return
    output = f"{result.stdout}{result.stderr}"
    lines = output.strip().splitlines() or [f"exit status {result.returncode}"]
    first = next((line for line in lines if "error" in line), lines[0])
    problem = f"{result.args[0]} does not compile {what}: {first}"
    raise BuildError(problem, plan.way_out, output)


def build_by_hand(build: Callable[[], Path]) -> int:
    """Build, say where the library is or what is wrong, and return the status of the command."""
    started_s = time.monotonic()
    try:
        library = build()
    except BuildError as error:
        # The whole of it is the developer's; elsewhere the first error is enough.
        sys.stderr.write(f"{error.output}{error.problem}\n{error.way_out}\n")
        return 1
    sys.stdout.write(f"{library} ({time.monotonic() - started_s:.1f} s)\n")
    return 0
