"""What this machine has for a mesh: processors, memory, files, a GPU, the services' packages."""

from __future__ import annotations

import importlib
import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from meshserve.cli.doctor.findings import Finding, ok, problem, warning
from meshserve.supervisor.plan import SERVICES
from meshserve.supervisor.statedir import STATE_VARIABLE
from services.engine.core.compiling import BuildError
from services.engine.core.kernels.cpu import library
from services.engine.core.kernels.cpu.build import check_machine, find_compiler
from services.engine.core.kernels.device_check import Verdicts, known_verdicts
from services.engine.core.memory import free_memory_bytes
from services.engine.core.processors import default_threads
from services.runtime.settings import Settings

GIB = 2**30
LEAST_MEMORY_BYTES = GIB
LEAST_DISK_BYTES = GIB
# Each connection takes one, and each service some tens for itself.
LEAST_OPEN_FILES = 1024
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


def packages() -> Iterator[Finding]:
    """Whether each service can be started with what is installed."""
    broken = False
    for name in SERVICES:
        try:
            importlib.import_module(f"services.{name}.service")
        except Exception as error:  # whatever a package that does not fit does when it is loaded
            broken = True
            yield problem(
                f"the {name} cannot be loaded: {error}",
                f"pip install --upgrade 'meshserve[{name}]'",
            )
    if not broken:
        yield ok("the packages of all services are installed")


def processors(cache_dir: Path) -> Iterator[Finding]:
    """What a CPU engine computes with."""
    threads = default_threads()
    try:
        path = library.find(cache_dir)
        if path is None:
            check_machine()
            compiler = find_compiler().version
            yield ok(
                f"{threads} threads; the CPU kernels are compiled at the first start, in a minute "
                f"or so, by {compiler}"
            )
            return
        names = library.isa_names(path)
    except BuildError as error:
        yield _slow(error.problem, error.way_out)
        return
    except library.UnavailableError as error:
        yield _slow(error.problem, error.way_out)
        return
    if names:
        yield ok(f"{threads} threads; CPU kernels for {names[0]}")
    else:
        yield _slow("this processor has no AVX2", "run the engine on a machine that has it")


def _slow(why: str, way_out: str) -> Finding:
    return warning(f"an engine on the CPU would be several times slower: {why}", way_out)


def memory() -> Iterator[Finding]:
    """What is free, within the limit of the container."""
    free = free_memory_bytes(torch.device("cpu"))
    text = f"{free / GIB:.1f} GiB of memory are free"
    if free < LEAST_MEMORY_BYTES:
        yield warning(text, "a mesh of the demo model takes 1 GiB; end something else")
    else:
        yield ok(text)


def open_files() -> Iterator[Finding]:
    """How many files a process may have open."""
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    text = f"a process may have {limit:,} files open"
    if limit < LEAST_OPEN_FILES:
        yield warning(
            f"{text}, and each connection takes one",
            f"`ulimit -n {min(most, 65536) if most > limit else 65536}`, or LimitNOFILE= of the "
            "unit that starts the mesh",
        )
    else:
        yield ok(text)


def folders(cache_dir: Path, state_dir: Path) -> Iterator[Finding]:
    """Whether models and state can be kept."""
    for what, folder, variable in (
        ("models", cache_dir, "MESHSERVE_CACHE"),
        ("state and logs", state_dir, STATE_VARIABLE),
    ):
        existing = next(each for each in (folder, *folder.parents) if each.exists())
        if not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
            yield problem(
                f"{existing} cannot be written, and {what} are to be kept in {folder}",
                f"set {variable} to a directory that can",
            )
            continue
        free = shutil.disk_usage(existing).free
        text = f"{free / GIB:.1f} GiB are free in {folder} for {what}"
        if free < LEAST_DISK_BYTES:
            yield warning(text, f"free some space, or set {variable} to a larger disk")
        else:
            yield ok(text)


def gpu(settings: Settings, cache_dir: Path) -> Iterator[Finding]:
    """Whether what the engine is told to compute on is there, and a GPU that nobody uses."""
    device = settings.engine.device
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            name = torch.cuda.get_device_name(index)
            yield ok(f"cuda:{index} is {name}, {free / GIB:.1f} of {total / GIB:.1f} GiB free")
            yield _gpu_kernels(known_verdicts(torch.device("cuda", index), cache_dir), index)
        return
    build = "has no CUDA" if torch.version.cuda is None else f"is for CUDA {torch.version.cuda}"
    if device.startswith("cuda"):
        yield problem(
            f"engine.device is {device}, and torch {torch.__version__}, which {build}, finds none",
            "set engine.device to auto, or install NVIDIA's driver and a torch built for CUDA",
        )
    elif device == "auto" and NVIDIA_DRIVER.exists():
        yield warning(
            f"there is an NVIDIA GPU that torch {torch.__version__}, which {build}, cannot use",
            "install a torch built for CUDA, or set engine.device to cpu if that is meant",
        )


def _gpu_kernels(verdicts: Verdicts | None, index: int) -> Finding:
    """What an engine found that checked its kernels on a card."""
    if verdicts is None:
        return ok(f"the kernels for cuda:{index} are checked at the first start of an engine")
    refused = [
        f"{name} of {op}: {problem}"
        for op, problems in verdicts.refused.items()
        for name, problem in problems.items()
    ]
    if not refused:
        return ok(f"all {len(verdicts.problems)} kernels compute on cuda:{index} what they should")
    return warning(
        f"{len(refused)} of {len(verdicts.problems)} kernels are not used on cuda:{index}, and "
        f"others in their place: {'; '.join(refused)}",
        "please report this, with `meshserve doctor --json`",
    )
