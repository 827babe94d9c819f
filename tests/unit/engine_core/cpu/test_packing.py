"""Packing loses nothing that a matrix's format holds, and rounds no further than it says."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from services.engine.core.kernels.cpu.library import Library
from services.engine.core.kernels.cpu.packing import (
    GROUP_INPUTS,
    GroupedWeight,
    concatenate,
    pack_bf16,
    pack_grouped,
    quantize_4,
    quantize_8,
)
from tests.fakes.amx_processor import libraries_with_amx
from tests.fakes.native_linear import random_grouped, run

KERNELS = libraries_with_amx()
pytestmark = pytest.mark.skipif(not KERNELS, reason="no native kernels on this machine")

each_isa = pytest.mark.parametrize("kernels", KERNELS, ids=lambda each: each.isa)

FORMATS = {
    "q8": {"bits": 8, "minima": False},
    "q8 with minima": {"bits": 8, "minima": True},
    "q4": {"bits": 4, "minima": True},
}
each_format = pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS.keys())
# One output, parts of a tile, of a strip, whole ones, and more than one of them.
each_size = pytest.mark.parametrize(
    "size", [(1, 32), (15, 64), (16, 32), (17, 96), (32, 64), (33, 32), (48, 160), (100, 32)]
)


def operands(kernels: Library, values: Tensor) -> Tensor:
    """What the machine multiplies: some sets have products of bf16 alone."""
    return values.bfloat16().float() if kernels.isa in ("amx", "avx512bf16") else values


@each_isa
@each_format
@each_size
def test_a_quantised_matrix_is_unpacked_with_its_own_values(
    kernels: Library, options: dict[str, int], size: tuple[int, int]
) -> None:
    weight = random_grouped(*size, **options)
    assert torch.equal(run(kernels, weight, None), operands(kernels, weight.dequantize()))


@each_isa
@each_size
def test_a_float_matrix_is_unpacked_rounded_to_bf16(
    kernels: Library, size: tuple[int, int]
) -> None:
    weight = torch.randn(size, generator=torch.Generator().manual_seed(1))
    assert torch.equal(run(kernels, pack_bf16(weight), None), weight.bfloat16().float())
    assert torch.equal(run(kernels, pack_bf16(weight.half()), None), weight.half().bfloat16())


@each_isa
@each_format
def test_gates_and_what_they_gate_come_in_alternating_tiles(
    kernels: Library, options: dict[str, int]
) -> None:
    weight = random_grouped(96, 64, **options)
    gates, values = weight.dequantize().view(2, 3, 16, 64)
    alternating = torch.stack((gates, values), dim=1).view(96, 64)
    packed = pack_grouped(weight, gated=True)
    assert torch.equal(run(kernels, packed, None), operands(kernels, alternating))
    packed = pack_bf16(weight.dequantize(), gated=True)
    assert torch.equal(run(kernels, packed, None), alternating.bfloat16().float())


@each_isa
@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_whatever_the_levels_and_scales_they_come_back(
    kernels: Library, data: st.DataObject
) -> None:
    bits = data.draw(st.sampled_from([4, 8]))
    minima = bits == 4 or data.draw(st.booleans())
    outputs, groups = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 5))
    weight = random_grouped(
        outputs, 32 * groups, bits=bits, minima=minima, seed=data.draw(st.integers(0, 99))
    )
    row, group = data.draw(st.integers(0, outputs - 1)), data.draw(st.integers(0, groups - 1))
    halves = st.floats(-65504, 65504, width=16)  # zero and the subnormal ones too
    weight.scales[row, group] = data.draw(halves)
    if weight.minima is not None:
        weight.minima[row, group] = data.draw(halves)
    assert torch.equal(run(kernels, weight, None), operands(kernels, weight.dequantize()))


@pytest.mark.parametrize("inputs", [1, 16, 31, 33, 48, 80])
def test_inputs_that_are_no_whole_groups_are_refused(inputs: int) -> None:
    weight = torch.zeros(16, inputs)
    for pack in (pack_bf16, quantize_8, quantize_4):
        with pytest.raises(ValueError, match=f"groups of 32, not {inputs}"):
            pack(weight)


@pytest.mark.parametrize("outputs", [2, 16, 48, 80])
def test_gates_that_are_no_whole_tiles_are_refused(outputs: int) -> None:
    weight = torch.zeros(outputs, 32)
    with pytest.raises(ValueError, match=f"tiles of 16, not {outputs // 2} of them"):
        pack_bf16(weight, gated=True)
    with pytest.raises(ValueError, match=f"tiles of 16, not {outputs // 2} of them"):
        pack_grouped(quantize_8(weight), gated=True)


def test_four_bits_without_minima_are_refused() -> None:
    weight = random_grouped(16, 32, bits=4, minima=False)
    with pytest.raises(ValueError, match="come with minima"):
        pack_grouped(weight)


def test_packing_takes_what_the_format_says() -> None:
    """Strips are whole: 40 outputs take the room of 64."""
    floats = torch.zeros(40, 64)
    assert pack_bf16(floats).num_bytes == 64 * 64 * 2
    assert pack_grouped(quantize_8(floats)).num_bytes == 64 * 2 * (32 + 2)
    assert pack_grouped(quantize_4(floats)).num_bytes == 64 * 2 * (16 + 2 + 2)


def matrices(seed: int) -> Tensor:
    """Groups of all sizes and kinds: narrow, wide, far from 0, on one side of it, and constant."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 10 ** torch.empty(64, 8, 1).uniform_(-2, 2, generator=generator)
    middles = sizes * torch.empty(64, 8, 1).uniform_(-2, 2, generator=generator).round()
    groups = middles + sizes * torch.randn(64, 8, GROUP_INPUTS, generator=generator)
    groups[3, 5], groups[4, 1], groups[5, 2] = 0.0, 2.5, -2.5
    return groups.view(64, -1)


def errors(weight: Tensor, quantise: Callable[[Tensor], GroupedWeight]) -> Tensor:
    """The largest error of each group, [outputs, groups]."""
    return (quantise(weight).dequantize() - weight).view(64, 8, -1).abs().amax(-1)


@pytest.mark.parametrize("seed", range(4))
def test_eight_bits_are_off_by_half_a_level(seed: int) -> None:
    weight = matrices(seed)
    largest = weight.view(64, 8, -1).abs().amax(-1)
    # Half a level, and what the rounding of the scale to a half costs at the far end.
    assert (errors(weight, quantize_8) <= largest * (0.5 / 127 + 2**-11) + 2**-18).all()


@pytest.mark.parametrize("seed", range(4))
def test_four_bits_are_off_by_little_more_than_half_a_level(seed: int) -> None:
    weight = matrices(seed)
    groups = weight.view(64, 8, -1)
    span, largest = groups.amax(-1) - groups.amin(-1), groups.abs().amax(-1)
    # Fitting the scale to all values costs the outermost up to another half of a level.
    assert (errors(weight, quantize_4) <= span / 15 + largest * 2**-9).all()
    found = quantize_4(weight).dequantize().view(64, 8, -1)
    levels = ((found - groups) / (span / 15).unsqueeze(-1))[span > largest / 8]
    # Plain rounding's error is spread evenly over one level: its mean square is a twelfth.
    assert levels.square().mean() < 1 / 12


def test_quantising_what_is_quantised_changes_nothing() -> None:
    weight = quantize_8(matrices(9))
    assert torch.equal(quantize_8(weight.dequantize()).dequantize(), weight.dequantize())


def test_parts_are_joined_with_their_own_values() -> None:
    first, second = random_grouped(10, 64, seed=1), random_grouped(6, 64, seed=2)
    joined = concatenate([first, second])
    assert joined is not None
    assert joined.shape == (16, 64)
    assert torch.equal(joined.dequantize(), torch.cat((first.dequantize(), second.dequantize())))
    centred, narrow = random_grouped(6, 64, minima=False), random_grouped(6, 64, bits=4)
    joined = concatenate([narrow, centred, first])
    assert joined is not None
    assert joined.bits == 8
    parts = (narrow.dequantize(), centred.dequantize(), first.dequantize())
    assert torch.equal(joined.dequantize(), torch.cat(parts))
    centred.scales[0, 0] = 600  # 128 times as much is no half
    assert concatenate([first, centred]) is None
