"""Kernels that compute one operation wrong are found out when an engine starts."""

from __future__ import annotations

import ctypes
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from services.engine.core.kernels.cpu import build, library
from services.engine.core.kernels.cpu.build import Recipe
from tests.fakes.paged_step import libraries

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not libraries(), reason="no native kernels on this machine"),
]


class Fault(NamedTuple):
    """What is wrong, in which source, and the check that shows it. FAULT stands for whether it is
    switched on."""

    source: str
    right: str
    wrong: str
    check: str


FAULTS: dict[str, Fault] = {
    "an addition to the residual stream": Fault(
        "linear_blocks.h",
        "args.epilogue == Epilogue::add ? add(load(to)",
        "args.epilogue == Epilogue::add && !FAULT ? add(load(to)",
        "norms",
    ),
    "SiLU": Fault(
        "linear_blocks.h",
        "broadcast(-1.44269504f)",
        "broadcast(FAULT ? -0.3f : -1.44269504f)",
        "epilogues",
    ),
    "GELU by tanh": Fault(
        "row_functions.h",
        "broadcast(1.5957691f)",
        "broadcast(FAULT ? 0.3f : 1.5957691f)",
        "epilogues",
    ),
    "tanh": Fault(
        "row_functions.h",
        "multiply(a, broadcast(2.0f))",
        "multiply(a, broadcast(FAULT ? 0.7f : 2.0f))",
        "epilogues",
    ),
    "LayerNorm's shift": Fault(
        "row_functions.h", "shift == nullptr ?", "shift == nullptr || FAULT ?", "norms"
    ),
    "LayerNorm's mean": Fault(
        "row_functions.h",
        "broadcast(sum(total) /",
        "broadcast(FAULT ? 0.0f : sum(total) /",
        "norms",
    ),
    "the norm after a layer": Fault(
        "program.cpp",
        "added = normed(op, row_of(op.source, index), worker.rank)",
        "added = FAULT ? row_of(op.source, index) "
        ": normed(op, row_of(op.source, index), worker.rank)",
        "norms",
    ),
    "the scale of embeddings": Fault(
        "program.cpp", "if (op.scale != 1.0f)", "if (op.scale != 1.0f && !FAULT)", "norms"
    ),
    "learned positions": Fault(
        "program.cpp",
        "if (op.positions != nullptr)",
        "if (op.positions != nullptr && !FAULT)",
        "norms",
    ),
    "rotation": Fault(
        "rotary_kv.cpp",
        "      rotate(own,",
        "      if (!FAULT) rotate(own,",
        "attention of families",
    ),
    "norms of queries and keys": Fault(
        "rotary_kv.cpp",
        "if (norm != nullptr)",
        "if (norm != nullptr && !FAULT)",
        "attention of families",
    ),
    "a window": Fault(
        "attention.h",
        "return window > 0 &&",
        "return !FAULT && window > 0 &&",
        "attention of families",
    ),
    "a soft cap": Fault(
        "attention.cpp",
        "cap_(args.softcap / args.scale)",
        "cap_(FAULT ? 0.0f : args.softcap / args.scale)",
        "attention of families",
    ),
    "the choice of experts": Fault(
        "experts.cpp",
        "if (!(logit > shares[chosen - 1])) continue;",
        "if (FAULT || !(logit > shares[chosen - 1])) continue;",
        "experts",
    ),
    "the shares of experts": Fault(
        "experts.cpp",
        "summed = shape.normalizes ?",
        "summed = shape.normalizes && !FAULT ?",
        "experts",
    ),
    "the rows of experts": Fault(
        "program.cpp",
        "from = all + order.slot(row, place)",
        "from = all + order.slot(row, FAULT ? 0 : place)",
        "experts",
    ),
    "what goes into an adapter": Fault(
        "adapters.cpp",
        "broadcast_pair(rows[r] + 2 * (pair + p))",
        "broadcast_pair(rows[FAULT ? 0 : r] + 2 * (pair + p))",
        "adapters",
    ),
    "what an adapter adds": Fault(
        "adapters.cpp",
        "store(sum, add(load(sum), sums[r][t]));",
        "store(sum, FAULT ? load(sum) : add(load(sum), sums[r][t]));",
        "adapters",
    ),
    "gates that wait for an adapter": Fault(
        "adapters.cpp",
        "multiply(open, value)",
        "multiply(FAULT ? gate : open, value)",
        "adapters",
    ),
    "GELU": Fault(
        "encoder_rows.h",
        "broadcast(0.70710678f)",
        "broadcast(FAULT ? 0.2f : 0.70710678f)",
        "encoders",
    ),
    "ReLU": Fault(
        "encoder_rows.h",
        "return larger(broadcast(0.0f), a);",
        "return FAULT ? a : larger(broadcast(0.0f), a);",
        "encoders",
    ),
    "an encoder's gates": Fault(
        "encoder_rows.h",
        "gated ? multiply(activated",
        "gated && !FAULT ? multiply(activated",
        "encoders",
    ),
    "an encoder's rotation": Fault(
        "encoder_rows.h",
        "subtract(multiply(first, c), multiply(second, s))",
        "FAULT ? first : subtract(multiply(first, c), multiply(second, s))",
        "encoders",
    ),
    "an encoder's window": Fault(
        "encoder_attention.h", "head_.window < 0 ?", "head_.window < 0 || FAULT ?", "encoders"
    ),
}
SWITCH = 'extern "C" __attribute__((visibility("default"))) int meshserve_fault;\n'
Breaks = Callable[[int], None]


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library with all faults, none of them switched on."""
    directory = tmp_path_factory.mktemp("faulty")
    sources = directory / "src"
    shutil.copytree(build.SOURCES, sources)
    for number, fault in enumerate(FAULTS.values(), 1):
        path = sources / fault.source
        text = path.read_text()
        assert fault.right in text, fault
        wrong = fault.wrong.replace("FAULT", f"(meshserve_fault == {number})")
        path.write_text(text.replace(fault.right, wrong))
    (sources / "fault.h").write_text(SWITCH)
    # One instruction set is enough, in the place of all.
    dispatch = (sources / "dispatch.cpp").read_text()
    for name in build.INSTRUCTION_SETS:
        if name != "avx2":
            declared = f"namespace {name} {{\nextern const Kernels kernels;"
            assert declared in dispatch
            alias = f"namespace {name} {{\nconst Kernels& kernels = avx2::kernels;"
            dispatch = dispatch.replace(declared, alias)
    (sources / "dispatch.cpp").write_text(f"{dispatch}\nint meshserve_fault = 0;\n")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(build, "INSTRUCTION_SETS", {"avx2": build.INSTRUCTION_SETS["avx2"]})
        flags = ("-O1", "-include", str(sources / "fault.h"))
        return build.build(directory / "out", Recipe(sources, flags))


@pytest.fixture
def switch(faulty: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Breaks]:
    """Switches one fault on, 0 for none, in the library that an engine would find."""
    monkeypatch.setattr(library, "find_or_build", lambda cache_dir=None: faulty)
    monkeypatch.setattr(library, "_active", library._active)
    monkeypatch.setattr(library, "_reason", library._reason)
    state = ctypes.c_int.in_dll(ctypes.CDLL(str(faulty)), "meshserve_fault")

    def to(number: int) -> None:
        state.value = number

    yield to
    state.value = 0


def test_without_a_fault_the_library_is_used(switch: Breaks) -> None:
    switch(0)
    assert library.activate("avx2") is not None


@pytest.mark.parametrize("name", FAULTS)
def test_a_library_that_computes_an_operation_wrong_is_refused(
    name: str, switch: Breaks, caplog: pytest.LogCaptureFixture
) -> None:
    switch(list(FAULTS).index(name) + 1)
    with caplog.at_level(logging.ERROR):
        assert library.activate("avx2") is None
    assert "CPU kernels: avx2 computes " in caplog.text
    assert FAULTS[name].check in caplog.text.partition(" wrongly here")[0].split(" computes ")[1]
