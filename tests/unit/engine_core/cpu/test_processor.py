"""Which instruction sets follow from what a processor says, for processors that are not here."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from services.engine.core.kernels.cpu import build

SOURCE = """
#include "processor.h"
extern "C" const char* names(const meshserve::Processor* of) { return meshserve::isa_names(*of); }
"""


class Processor(ctypes.Structure):
    """`struct Processor` of src/processor.h."""

    _fields_ = (
        ("leaf1_ecx", ctypes.c_uint32),
        ("leaf7_ebx", ctypes.c_uint32),
        ("leaf7_ecx", ctypes.c_uint32),
        ("leaf7_edx", ctypes.c_uint32),
        ("leaf7_1_eax", ctypes.c_uint32),
        ("saved", ctypes.c_uint64),
    )


# Intel's Software Developer's Manual, volume 2, CPUID, and volume 1, chapter 13.
BITS = {
    "fma": ("leaf1_ecx", 12),
    "osxsave": ("leaf1_ecx", 27),
    "avx": ("leaf1_ecx", 28),
    "f16c": ("leaf1_ecx", 29),
    "avx2": ("leaf7_ebx", 5),
    "avx512f": ("leaf7_ebx", 16),
    "avx512dq": ("leaf7_ebx", 17),
    "avx512bw": ("leaf7_ebx", 30),
    "avx512vl": ("leaf7_ebx", 31),
    "avx512vbmi": ("leaf7_ecx", 1),
    "avx512_vnni": ("leaf7_ecx", 11),
    "amx_bf16": ("leaf7_edx", 22),
    "amx_tile": ("leaf7_edx", 24),
    "amx_int8": ("leaf7_edx", 25),
    "avx512_bf16": ("leaf7_1_eax", 5),
    "saves xmm": ("saved", 1),
    "saves ymm": ("saved", 2),
    "saves opmask": ("saved", 5),
    "saves zmm": ("saved", 6),
    "saves zmm16-31": ("saved", 7),
    "saves tilecfg": ("saved", 17),
    "saves tiledata": ("saved", 18),
}
HASWELL = {"fma", "osxsave", "avx", "f16c", "avx2", "saves xmm", "saves ymm"}
CASCADE_LAKE = HASWELL | {
    *("avx512f", "avx512dq", "avx512bw", "avx512vl", "avx512_vnni"),
    *("saves opmask", "saves zmm", "saves zmm16-31"),
}
ZEN_4 = CASCADE_LAKE | {"avx512vbmi", "avx512_bf16"}
SAPPHIRE_RAPIDS = ZEN_4 | {
    *("amx_bf16", "amx_tile", "amx_int8"),
    *("saves tilecfg", "saves tiledata"),
}


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> Callable[[set[str]], str]:
    """The instruction sets of a processor that has what is named."""
    directory = tmp_path_factory.mktemp("processor")
    (directory / "names.cpp").write_text(SOURCE)
    compiler = build.find_compiler().command
    include = Path(build.SOURCES)
    library = directory / "names.so"
    command = [*compiler, "-std=c++20", "-shared", "-fPIC", f"-I{include}"]
    subprocess.run([*command, str(directory / "names.cpp"), "-o", str(library)], check=True)
    ask = ctypes.CDLL(str(library)).names
    ask.restype = ctypes.c_char_p

    def of(features: set[str]) -> str:
        processor = Processor()
        for feature in features:
            field, bit = BITS[feature]
            setattr(processor, field, getattr(processor, field) | 1 << bit)
        return ask(ctypes.byref(processor)).decode()

    return of


def test_each_generation_gets_what_it_has(names: Callable[[set[str]], str]) -> None:
    assert names(set()) == ""
    assert names(HASWELL) == "avx2"
    assert names(CASCADE_LAKE) == "avx512 avx2"
    assert names(ZEN_4) == "avx512bf16 avx512 avx2"
    assert names(SAPPHIRE_RAPIDS) == "amx avx512bf16 avx512 avx2"


@pytest.mark.parametrize("missing", sorted(SAPPHIRE_RAPIDS))
def test_whatever_is_missing_takes_away_what_needs_it(
    names: Callable[[set[str]], str], missing: str
) -> None:
    needs = [
        name
        for name, features in (
            ("amx", SAPPHIRE_RAPIDS),
            ("avx512bf16", ZEN_4),
            ("avx512", CASCADE_LAKE),
            ("avx2", HASWELL),
        )
        if missing not in features
    ]
    assert names(SAPPHIRE_RAPIDS - {missing}) == " ".join(needs)
