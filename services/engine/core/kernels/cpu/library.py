"""Loads the compiled kernels, chooses an instruction set, and checks that it computes correctly.

`activate` is called once, when an engine starts. Everything else asks `active()`, and goes without
the kernels where it returns None: `why_not()` says why for the start-up lines of the op registry.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, TypeAlias

import torch

from services.engine.core.compiling import BuildError
from services.engine.core.kernels.cpu.build import PACKAGE, Recipe, build, check_machine
from services.runtime.modelfiles import default_cache_dir

logger = logging.getLogger(__name__)

Choice: TypeAlias = Literal["auto", "amx", "avx512bf16", "avx512", "avx2", "off"]


class KernelTable(ctypes.Structure):
    """`struct Kernels` of src/kernels.h, field by field."""

    _fields_ = (
        ("size", ctypes.c_size_t),
        ("isa", ctypes.c_char_p),
        ("make_team", ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int32, ctypes.c_void_p)),
        ("free_team", ctypes.CFUNCTYPE(None, ctypes.c_void_p)),
        (
            "run_rotary_kv",
            ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32),
        ),
        (
            "run_attention",
            ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32),
        ),
        ("make_program", ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)),
        ("run_program", ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p)),
        ("free_program", ctypes.CFUNCTYPE(None, ctypes.c_void_p)),
        ("sampling_scratch_bytes", ctypes.CFUNCTYPE(ctypes.c_size_t, ctypes.c_void_p)),
        (
            "run_sampling",
            ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p),
        ),
        ("make_encoder", ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)),
        ("run_encoder", ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p)),
        ("free_encoder", ctypes.CFUNCTYPE(None, ctypes.c_void_p)),
    )


@dataclass(frozen=True, slots=True, eq=False)
class Library:
    """The kernels of one instruction set. Calls release the GIL."""

    isa: str
    path: Path
    table: KernelTable


class UnavailableError(Exception):
    """The kernels cannot be used. `way_out` says what would change that."""

    def __init__(self, problem: str, way_out: str) -> None:
        super().__init__(f"{problem}; {way_out}")
        self.problem = problem
        self.way_out = way_out


Check: TypeAlias = Callable[[Library], bool]
_CHECKS: dict[str, Check] = {}
_active: Library | None = None
_reason = "no engine has been started"


def check(name: str) -> Callable[[Check], Check]:
    """Register a check of a kernel on a small known input: whether its answer is right.

    An instruction set that fails one is not used. Checks run at every start: keep them short.
    """

    def register(function: Check) -> Check:
        if name in _CHECKS:
            raise ValueError(f"there are two checks named {name!r}")
        _CHECKS[name] = function
        return function

    return register


def self_check(library: Library) -> list[str]:
    """Run every registered check; return the names of those that failed."""
    threads = torch.get_num_threads()
    # For numbers this few, waking others costs more than they save.
    torch.set_num_threads(1)
    try:
        return [name for name, passes in _CHECKS.items() if not passes(library)]
    finally:
        torch.set_num_threads(threads)


def active() -> Library | None:
    """Return the kernels in use, or None while there are none."""
    return _active


def why_not() -> str | None:
    """Return why there are no kernels in use, or None if there are: a probe for the op registry."""
    return None if _active is not None else _reason


def activate(choice: Choice = "auto", cache_dir: Path | None = None) -> Library | None:
    """Choose the kernels that this process uses, compiling them where that has not been done.

    "auto" takes the best instruction set that the machine has and whose kernels compute correctly.
    What was chosen, or what is missed and how to get it, is logged in one line. Never raises:
    without kernels the engine runs on plain torch.
    """
    global _active, _reason
    _active, _reason = None, "switched off by engine.cpu_kernels"
    if choice == "off":
        logger.info("CPU kernels: off, as engine.cpu_kernels says; running on plain torch")
        return None
    try:
        path = find_or_build(cache_dir)
        names = isa_names(path)
        if not names:
            raise UnavailableError("this processor has no AVX2", "nothing is to be done about it")
        candidates = names if choice == "auto" else [choice]
        for name in candidates:
            try:
                library = load(path, name)
            except UnavailableError as error:
                if name == candidates[-1]:
                    raise
                logger.warning("CPU kernels: %s; %s", error.problem, error.way_out)
                continue
            failed = self_check(library)
            if not failed:
                _active = library
                logger.info("CPU kernels: %s, of %s in %s", name, ", ".join(names), path)
                return library
            logger.error("CPU kernels: %s computes %s wrongly here", name, ", ".join(failed))
        raise UnavailableError("no instruction set computes correctly here", "please report this")
    except UnavailableError as error:
        _reason = error.problem
        logger.warning(
            "CPU kernels: none, running on plain torch, which is several times slower: %s; %s",
            error.problem,
            error.way_out,
        )
    return None


def find_or_build(cache_dir: Path | None = None) -> Path:
    """Return the library of the present sources: the installed, the cached, or one compiled now.

    Raises:
        UnavailableError: there is none and it cannot be compiled.
    """
    cached = _kept_in(cache_dir)
    try:
        check_machine()
        path = find(cache_dir)
        if path is not None:
            return path
        logger.info("CPU kernels: compiling them into %s, once, for a minute or so", cached)
        return build(cached, Recipe())
    except BuildError as error:
        raise UnavailableError(error.problem, error.way_out) from None


def find(cache_dir: Path | None = None) -> Path | None:
    """Return the library of the present sources, the installed or the cached; None if neither is
    there."""
    recipe = Recipe()
    for path in (*recipe.find(PACKAGE), *recipe.find(_kept_in(cache_dir))):
        try:
            isa_names(path)
        except UnavailableError:
            continue  # built where the C library is newer; this machine's own will do
        return path
    return None


def _kept_in(cache_dir: Path | None) -> Path:
    return (cache_dir or default_cache_dir()) / "kernels"


def isa_names(path: Path) -> list[str]:
    """Return the instruction sets of a library that this machine has, the best one first.

    Raises:
        UnavailableError: the library cannot be loaded.
    """
    names: bytes = _open(path).meshserve_isa_names()
    return names.decode().split()


@cache
def load(path: Path, isa: str) -> Library:
    """Return the kernels of an instruction set by its name.

    Raises:
        UnavailableError: the library cannot be loaded, the machine lacks the instruction set, or
            the operating system does not give it to this process.
    """
    names = isa_names(path)
    if isa not in names:
        has = ", ".join(names) or "none of the instruction sets that the kernels use"
        raise UnavailableError(
            f"this processor lacks {isa}; it has {has}", "set engine.cpu_kernels to auto"
        )
    if error := _open(path).meshserve_request(isa.encode()):
        raise UnavailableError(
            f"the operating system refuses {isa}: {os.strerror(error)}",
            "engine.cpu_kernels takes another instruction set",
        )
    return Library(isa, path, table_of(path, isa))


def table_of(path: Path, isa: str) -> KernelTable:
    """Return what a library has for an instruction set, whether or not this machine can run it."""
    table = _open(path).meshserve_kernels(isa.encode())
    if table.contents.size != ctypes.sizeof(KernelTable):
        raise UnavailableError(
            f"{path} and library.py disagree about the table of kernels", "please report this"
        )
    contents: KernelTable = table.contents
    return contents


@cache
def _open(path: Path) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(path))
        library.meshserve_isa_names.restype = ctypes.c_char_p
        library.meshserve_isa_names.argtypes = ()
        library.meshserve_request.restype = ctypes.c_int
        library.meshserve_request.argtypes = (ctypes.c_char_p,)
        library.meshserve_kernels.restype = ctypes.POINTER(KernelTable)
        library.meshserve_kernels.argtypes = (ctypes.c_char_p,)
    except (OSError, AttributeError) as error:
        raise UnavailableError(
            f"{path} cannot be loaded: {error}", f"remove it to have it compiled here ({PACKAGE})"
        ) from None
    return library
