"""Linear layers on AMX: what they compute, by which instructions, and when they are not used."""

from __future__ import annotations

import errno
import logging
import subprocess
import sys

import numpy as np
import pytest
import torch

from services.engine.core.kernels.cpu import library, self_check
from services.engine.core.kernels.cpu.library import Library
from services.engine.core.kernels.cpu.packing import PackedLinear, pack_bf16, pack_grouped
from services.engine.core.kernels.cpu.program import Epilogue
from tests.fakes.amx_processor import AmxProcessor, emulated, libraries_with_amx, pretend
from tests.fakes.native_linear import random_grouped, run

KERNELS = {each.isa: each for each in libraries_with_amx()}
pytestmark = pytest.mark.skipif("amx" not in KERNELS, reason="no AVX512-BF16 on this machine")

ROWS = random_grouped(100, 96, seed=3)
# The formats of weights whose products a fault spoils.
SHOWN_BY = dict.fromkeys(
    ("last row", "last input", "doubled stride", "kept sums"),
    ("bf16", "q8", "q8 with minima", "q4"),
) | {"signed bytes": ("q8", "q8 with minima"), "swapped pairs": ("bf16",)}
BYTES = {"q8": (8, False), "q8 with minima": (8, True), "q4": (4, True)}


@pytest.fixture
def amx() -> Library:
    return KERNELS["amx"]


@pytest.fixture
def processor() -> AmxProcessor:
    """AMX in software: it knows what has been executed."""
    found = emulated()
    if found is None:
        pytest.skip("this processor has AMX itself")
    return found


def bf16(values: np.ndarray) -> np.ndarray:
    """The upper halves of float32 values that lose nothing thereby."""
    bits = values.astype(np.float32).view(np.uint32)
    assert not (bits & 0xFFFF).any()
    return (bits >> 16).astype(np.uint16)


def multiplied(
    processor: AmxProcessor, c: np.ndarray, a: np.ndarray, b: np.ndarray, kind: int
) -> np.ndarray:
    """c + a x b as the processor has it. c: [rows, 16], a: [rows, inputs, 4 bytes]."""
    result = c.copy()
    a, b = np.ascontiguousarray(a), np.ascontiguousarray(b)
    processor.multiply(result.ctypes.data, a.ctypes.data, b.ctypes.data, len(c), a.shape[1], kind)
    return result


def flushed(values: np.ndarray) -> np.ndarray:
    """float32 values with 0 for the subnormal ones."""
    return np.where(np.abs(values) < np.finfo(np.float32).tiny, np.float32(0), values)


SIZES = [(1, 1), (1, 16), (9, 8), (16, 8), (16, 16)]  # rows, inputs of four bytes


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("kind", "first", "second"),
    [
        (0, np.uint8, np.uint8),
        (1, np.uint8, np.int8),
        (2, np.int8, np.uint8),
        (3, np.int8, np.int8),
    ],
    ids=["TDPBUUD", "TDPBUSD", "TDPBSUD", "TDPBSSD"],
)
def test_the_software_multiplies_bytes_as_numpy_does(
    processor: AmxProcessor, size: tuple[int, int], kind: int, first: type, second: type
) -> None:
    random = np.random.default_rng(1)
    rows, inputs = size
    a = random.integers(0, 256, (rows, inputs, 4)).astype(np.uint8).view(first)
    b = random.integers(0, 256, (inputs, 16, 4)).astype(np.uint8).view(second)
    a[0], b[0] = np.iinfo(first).max, np.iinfo(second).max
    c = random.integers(-(2**30), 2**30, (rows, 16)).astype(np.int32)
    expected = c + np.einsum("mki,kni->mn", a.astype(np.int64), b.astype(np.int64))
    assert np.array_equal(multiplied(processor, c, a, b, kind), expected)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("exponents", [(-8, 8), (-70, -58)], ids=["usual", "subnormal products"])
def test_the_software_multiplies_bf16_as_the_manual_says(
    processor: AmxProcessor, size: tuple[int, int], exponents: tuple[int, int]
) -> None:
    """Two sums, of first members and of second ones, each rounded after every product; subnormal
    numbers are 0, before and after."""
    random = np.random.default_rng(2)
    rows, inputs = size

    def values(*shape: int) -> np.ndarray:
        fractions = 1 + random.integers(0, 128, shape) / 128
        powers = random.integers(*exponents, shape).astype(np.float64)
        return (random.choice([-1, 1], shape) * fractions * 2.0**powers).astype(np.float32)

    a, b = values(rows, inputs, 2), values(inputs, 16, 2)
    a[0, 0, 0], b[0, 0, 1] = 2.0**-130, -(2.0**-133)  # subnormal
    c = values(rows, 16) * values(rows, 16)
    sums = np.zeros((2, rows, 16), np.float32)
    for k in range(inputs):
        for member in range(2):
            # Products of bf16, and their sums with a float of such a size, are exact in float64:
            # what follows is one rounding.
            products = np.float64(flushed(a[:, k, member]))[:, None] * flushed(b[k, :, member])
            sums[member] = flushed((np.float64(sums[member]) + products).astype(np.float32))
    expected = flushed(flushed(c) + flushed(sums[0] + sums[1]))
    found = multiplied(processor, c, bf16(a), bf16(b), 4)
    assert np.array_equal(found, expected)


def weights(weight_format: str, outputs: int = 104, **how: bool) -> PackedLinear:
    if weight_format == "bf16":
        floats = torch.randn(outputs, 96, generator=torch.Generator().manual_seed(5))
        return pack_bf16(floats, **how)
    bits, minima = BYTES[weight_format]
    return pack_grouped(random_grouped(outputs, 96, bits=bits, minima=minima, seed=5), **how)


@pytest.mark.parametrize("weight_format", BYTES)
@pytest.mark.parametrize("epilogue", list(Epilogue), ids=lambda each: each.name.lower())
def test_matrices_in_bytes_give_the_same_bits_as_without_tiles(
    amx: Library, weight_format: str, epilogue: Epilogue
) -> None:
    gated = epilogue.gates
    packed = weights(weight_format, outputs=224 if gated else 104, gated=gated)
    onto = torch.randn(100, 104) if epilogue is Epilogue.ADD else None
    for count in (1, 8, *range(9, 20), 31, 33, 48, 65, 100):
        before = None if onto is None else onto[:count]
        how = {"epilogue": epilogue, "onto": before, "token_ids": range(count), "cap": 3.0}
        found = [run(KERNELS[isa], ROWS, packed, **how) for isa in ("amx", "avx512bf16")]
        assert torch.equal(*found), count


@pytest.mark.parametrize("count", [1, 8, 9, 16, 17, 40])
@pytest.mark.parametrize("weight_format", ["bf16", *BYTES])
def test_tiles_multiply_all_of_bf16_and_bytes_where_rows_are_many(
    amx: Library, processor: AmxProcessor, weight_format: str, count: int
) -> None:
    packed = weights(weight_format)
    before = processor.executed()
    run(amx, ROWS, packed, token_ids=range(count))
    executed = {name: n - before[name] for name, n in processor.executed().items()}

    strip_halves, row_tiles = 8, -(-count // 16)
    if weight_format == "bf16":
        row_tiles += row_tiles % 2 if row_tiles > 1 else 0
        assert executed["TDPBF16PS"] == strip_halves * row_tiles * 3  # 32 inputs at a time
        assert executed["products of bytes"] == 0
    else:
        assert executed["TDPBF16PS"] == 0
        groups = strip_halves * row_tiles * 3
        assert executed["products of bytes"] == (groups if count > 8 else 0)
    assert executed["TILERELEASE"] == executed["LDTILECFG"]  # a thread at rest holds no tiles


@pytest.fixture(autouse=True)
def whatever_was_active(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_active", library._active)
    monkeypatch.setattr(library, "_reason", library._reason)


@pytest.fixture
def a_machine_with_amx(monkeypatch: pytest.MonkeyPatch, processor: AmxProcessor) -> None:
    pretend(monkeypatch)


@pytest.mark.usefixtures("a_machine_with_amx")
def test_a_processor_that_has_amx_uses_it(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    chosen = library.activate()
    assert chosen is not None
    assert chosen.isa == "amx"
    assert "CPU kernels: amx, of amx, avx512bf16, " in caplog.text
    forbidden = library.activate("avx512bf16")
    assert forbidden is not None
    assert forbidden.isa == "avx512bf16"


def test_where_the_operating_system_refuses_tiles_the_next_set_is_taken(
    monkeypatch: pytest.MonkeyPatch, processor: AmxProcessor, caplog: pytest.LogCaptureFixture
) -> None:
    """The real one is asked here: it has none to give."""
    pretend(monkeypatch, granted=False)
    caplog.set_level(logging.INFO)
    chosen = library.activate()
    assert chosen is not None
    assert chosen.isa == "avx512bf16"
    assert "CPU kernels: the operating system refuses amx: " in caplog.text
    assert library.activate("amx") is None
    assert "the operating system refuses amx" in (library.why_not() or "")


def test_a_machine_that_shows_tiles_and_traps_them_is_found_out_in_a_child() -> None:
    path = library.find_or_build()
    # Another process, which has no AMX in software.
    code = f"import ctypes; print(ctypes.CDLL({str(path)!r}).meshserve_try_tiles())"
    tried = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    has_tiles = "amx" in library.isa_names(path)
    assert int(tried.stdout) == (0 if has_tiles else errno.ENOTSUP)


def test_a_machine_whose_tiles_work_is_found_to_have_them(processor: AmxProcessor) -> None:
    before = processor.executed()["LDTILECFG"]
    assert library._open(library.find_or_build()).meshserve_try_tiles() == 0
    assert processor.executed()["LDTILECFG"] == before, "they are tried in a child"


@pytest.mark.usefixtures("a_machine_with_amx")
@pytest.mark.parametrize("fault", SHOWN_BY)
def test_a_processor_that_computes_wrongly_is_found_out_at_the_start(
    processor: AmxProcessor, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    with processor.broken(fault):
        chosen = library.activate()
    assert chosen is not None
    assert chosen.isa == "avx512bf16"
    assert "CPU kernels: amx computes linear layers" in caplog.text


@pytest.mark.parametrize(
    ("fault", "weight_format"),
    [(fault, each) for fault, formats in SHOWN_BY.items() for each in formats],
)
def test_the_check_at_the_start_covers_each_format_by_itself(
    amx: Library, processor: AmxProcessor, fault: str, weight_format: str
) -> None:
    rounding = self_check.ROUNDINGS[weight_format]
    assert self_check._linear_is_right(amx, rounding)
    with processor.broken(fault):
        assert not self_check._linear_is_right(amx, rounding)
