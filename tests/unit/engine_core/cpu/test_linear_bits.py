"""A row's output has the same bits whatever else the native linear layers compute, and on whom."""

from __future__ import annotations

import pytest
import torch

from services.engine.core.kernels.cpu.library import Library
from services.engine.core.kernels.cpu.packing import (
    PackedLinear,
    pack_bf16,
    pack_grouped,
    quantize_4,
    quantize_8,
)
from services.engine.core.kernels.cpu.program import Epilogue
from tests.fakes.amx_processor import libraries_with_amx
from tests.fakes.native_linear import Norm, random_grouped, run

KERNELS = libraries_with_amx()
pytestmark = pytest.mark.skipif(not KERNELS, reason="no native kernels on this machine")

each_isa = pytest.mark.parametrize("kernels", KERNELS, ids=lambda each: each.isa)
each_format = pytest.mark.parametrize("weight_format", ["bf16", "q8", "q8 with minima", "q4"])

INPUTS, OUTPUTS = 160, 224  # seven strips: an odd number of pairs
ROWS = random_grouped(33, INPUTS, seed=3)
NORM = Norm(torch.linspace(-1, 2, INPUTS), 1e-5)


def weights(weight_format: str, *, gated: bool = False) -> PackedLinear:
    floats = torch.randn(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(5))
    if weight_format == "bf16":
        return pack_bf16(floats, gated=gated)
    if weight_format == "q8 with minima":
        return pack_grouped(random_grouped(OUTPUTS, INPUTS), gated=gated)
    return pack_grouped((quantize_4 if weight_format == "q4" else quantize_8)(floats), gated=gated)


@each_isa
@each_format
@pytest.mark.parametrize("epilogue", list(Epilogue), ids=lambda each: each.name.lower())
def test_a_row_has_its_bits_in_any_company(
    kernels: Library, weight_format: str, epilogue: Epilogue
) -> None:
    packed = weights(weight_format, gated=epilogue.gates)
    onto = torch.randn(33, OUTPUTS) if epilogue is Epilogue.ADD else None

    def compute(ids: list[int]) -> torch.Tensor:
        before = None if onto is None else onto[ids]
        how = {"norm": NORM, "epilogue": epilogue, "onto": before, "token_ids": ids, "cap": 3.0}
        return run(kernels, ROWS, packed, threads=1, **how)

    alone = torch.cat([compute([row]) for row in range(33)])
    generator = torch.Generator().manual_seed(1)
    for count in range(2, 34):
        ids = torch.randperm(33, generator=generator)[:count].tolist()
        assert torch.equal(compute(ids), alone[ids]), count


@each_isa
@each_format
@pytest.mark.parametrize("num_rows", [1, 2, 9, 33])
def test_neither_threads_nor_repetition_change_a_bit(
    kernels: Library, weight_format: str, num_rows: int
) -> None:
    packed = weights(weight_format)
    first = run(kernels, ROWS, packed, norm=NORM, token_ids=range(num_rows), threads=1)
    for threads in (1, 2, 3, 3):
        again = run(kernels, ROWS, packed, norm=NORM, token_ids=range(num_rows), threads=threads)
        assert torch.equal(first, again)


@each_isa
@each_format
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("normed", [True, False], ids=["normed", "as it is"])
def test_what_is_not_a_number_stays_in_its_row(
    kernels: Library, weight_format: str, poison: float, normed: bool
) -> None:
    packed, norm = weights(weight_format), NORM if normed else None
    broken = random_grouped(33, INPUTS, seed=3)
    assert broken.minima is not None
    broken.minima[5, 2] = broken.minima[20, 0] = poison
    clean = run(kernels, ROWS, packed, norm=norm, threads=1)

    found = run(kernels, broken, packed, norm=norm, threads=1)

    healthy = torch.ones(33, dtype=torch.bool)
    healthy[[5, 20]] = False
    assert torch.equal(found[healthy], clean[healthy])
    assert not found[~healthy].isfinite().any()
