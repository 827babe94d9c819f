"""A processor with Intel AMX for tests: the real one, or amx_processor.cpp on one without.

What runs is the machine code of the library that an engine loads.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest

from services.engine.core.kernels.cpu import library
from services.engine.core.kernels.cpu.build import SANITIZER_FLAGS, find_compiler
from services.engine.core.kernels.cpu.library import Library

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ("-std=c++20", "-O3", "-mavx2", "-mfma", "-ffp-contract=off", "-fPIC", "-shared")
# As the source's enumerations have them.
FAULTS = (
    "last row",  # of a tile is not stored
    "last input",  # four bytes, or a pair, of every product are left out
    "signed bytes",  # bytes of weights count as signed
    "swapped pairs",  # first members of bf16 pairs meet second ones
    "doubled stride",  # every other row is loaded
    "kept sums",  # TILEZERO does nothing
)
INSTRUCTIONS = (
    "LDTILECFG",
    "TILERELEASE",
    "TILEZERO",
    "TILELOADD",
    "TILESTORED",
    "products of bytes",
    "TDPBF16PS",
)


class AmxProcessor:
    """AMX in software, for every thread of this process."""

    def __init__(self) -> None:
        sanitized = SANITIZER_FLAGS if "TESTED_KERNELS" in os.environ else ()
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "amx_processor.so"
            command = [*find_compiler().command, *FLAGS, *sanitized, str(SOURCE), "-o", str(path)]
            subprocess.run(command, check=True)
            self._library = ctypes.CDLL(str(path))
        self._library.amx_executed.restype = ctypes.c_int64
        self.multiply = self._library.amx_multiply
        self.multiply.argtypes = (*[ctypes.c_void_p] * 3, *[ctypes.c_int] * 3)
        self._library.amx_install()

    def executed(self) -> dict[str, int]:
        """How often each instruction has been executed so far."""
        return {name: self._library.amx_executed(i) for i, name in enumerate(INSTRUCTIONS)}

    @contextmanager
    def broken(self, fault: str) -> Iterator[None]:
        """Compute wrongly in one of the ways of FAULTS."""
        self._library.amx_break(1 + FAULTS.index(fault))
        try:
            yield
        finally:
            self._library.amx_break(0)


@cache
def emulated() -> AmxProcessor | None:
    """AMX in software where this machine lacks it and has all else that the kernels need of it."""
    names = library.isa_names(library.find_or_build())
    return AmxProcessor() if "amx" not in names and "avx512bf16" in names else None


def libraries_with_amx() -> list[Library]:
    """Return the kernels of every instruction set of this machine, and those of AMX if they can
    be run here."""
    try:
        path = library.find_or_build()
    except library.UnavailableError:
        return []
    found = [library.load(path, name) for name in library.isa_names(path)]
    if emulated() is not None:
        found.insert(0, Library("amx", path, library.table_of(path, "amx")))
    return found


def pretend(monkeypatch: pytest.MonkeyPatch, *, granted: bool = True) -> None:
    """Have this machine's processor say that it has AMX, where it is emulated.

    granted: whether the operating system says so too. It is asked itself otherwise.
    """
    if emulated() is None:
        return
    native = library.isa_names
    monkeypatch.setattr(library, "isa_names", lambda path: ["amx", *native(path)])
    if granted:
        opened = library._open(library.find_or_build())
        monkeypatch.setattr(opened, "meshserve_request", lambda isa: 0)
    library.load.cache_clear()
