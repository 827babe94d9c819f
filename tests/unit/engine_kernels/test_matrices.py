"""Matrices of few bits keep the values of a checkpoint, and ops compute with these values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from services.engine.core.kernels import (
    GroupedMatrix,
    ScaledMatrix,
    grouped_embedding,
    grouped_linear,
    quantize_rows,
    scaled_linear,
)
from services.engine.core.kernels.cpu.packing import GroupedWeight, quantize_4, quantize_8


def weight(
    bits: int, group: int, *, centred: bool = False, outputs: int = 6, inputs: int = 256
) -> GroupedWeight:
    """Random levels in groups of some size, as a checkpoint would give them: by 32."""
    levels = torch.randint(0, 1 << bits, (outputs, inputs), dtype=torch.uint8)
    scales = (torch.rand(outputs, inputs // group) / 8 + 0.01).half()
    minima = scales * -(1 << bits - 1) if centred else torch.randn(scales.shape).half()
    scales, minima = (each.repeat_interleave(group // 32, 1) for each in (scales, minima))
    return GroupedWeight(levels, scales, None if centred and bits == 8 else minima, bits)


@pytest.mark.parametrize("group", [32, 64, 128, 256])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("centred", [False, True])
def test_the_values_of_a_checkpoint_are_kept_in_no_more_bytes_than_they_need(
    bits: int, group: int, centred: bool
) -> None:
    stored = weight(bits, group, centred=centred)
    matrix = GroupedMatrix.of(stored)
    assert torch.equal(matrix.dequantize(), stored.dequantize())
    assert matrix.shape == stored.shape
    assert matrix.group_size == min(group, 128)
    assert (matrix.minima is None) == centred
    halves = 6 * 256 // min(group, 128) * (1 if centred else 2)
    assert matrix.nbytes == 6 * 256 * bits // 8 + 2 * halves


def test_sixteen_bytes_of_four_bits_are_32_inputs_in_a_row() -> None:
    levels = (torch.arange(64) % 16).to(torch.uint8).view(1, 64)
    levels[0, 48:] = 7
    ones = torch.ones(1, 2, dtype=torch.float16)
    packed = GroupedMatrix.of(GroupedWeight(levels, ones, ones, 4)).levels
    assert packed.tolist()[0] == [17 * j for j in range(16)] + [0x70 + j for j in range(16)]


def test_groups_of_32_stay_where_one_scale_differs() -> None:
    stored = weight(4, 128)
    stored.scales[3, 5] += 1
    matrix = GroupedMatrix.of(stored)
    assert matrix.group_size == 32
    assert torch.equal(matrix.dequantize(), stored.dequantize())


@pytest.mark.parametrize("round_weight", [quantize_4, quantize_8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_projections_of_grouped_weights_are_their_definition(
    round_weight: object, dtype: torch.dtype
) -> None:
    stored = round_weight(torch.randn(24, 96))  # type: ignore[operator]
    hidden, bias = torch.randn(5, 96).to(dtype), torch.randn(24).to(dtype)
    found = grouped_linear(hidden, GroupedMatrix.of(stored), bias)
    values = stored.dequantize().to(dtype).double()
    expected = hidden.double() @ values.T + bias.double()
    assert found.dtype == dtype
    close(found, expected, 1e-6 if dtype == torch.float32 else 2**-8)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_projections_of_eight_bits_by_eight_are_their_definition(dtype: torch.dtype) -> None:
    # Long rows of large levels: no sum of 24 bits would hold these exactly.
    floats, hidden = torch.rand(6, 4096) + 1, torch.rand(3, 4096) + 1
    matrix = ScaledMatrix.rounded(floats, dtype)
    elements, scales = quantize_rows(hidden, dtype)
    bias = torch.randn(6)
    found = scaled_linear(elements, scales, matrix, bias, torch.float32)
    rows = elements.double() * scales.double().unsqueeze(1)
    values = matrix.elements.double() * matrix.scales.double().unsqueeze(1)
    close(found, rows @ values.T + bias.double(), 1e-6)
    close(found, hidden.double() @ floats.double().T, 0.02)
    assert scaled_linear(elements, scales, matrix, None, torch.bfloat16).dtype == torch.bfloat16


def test_rows_are_rounded_each_by_its_largest_element() -> None:
    floats = torch.randn(7, 96) * torch.tensor([1e-5, 1, 1e5, 0, 1, 1, 1])[:, None]
    matrix = ScaledMatrix.rounded(floats, torch.int8)
    assert matrix.elements.abs().amax(1).tolist() == [127, 127, 127, 0, 127, 127, 127]
    assert ((matrix.dequantize() - floats).abs() <= matrix.scales[:, None] * 0.5001).all()


def test_a_checkpoint_with_a_scale_for_each_output_keeps_its_levels() -> None:
    stored = weight(8, 256, centred=True)
    matrix = ScaledMatrix.of(stored)
    assert matrix is not None
    assert torch.equal(matrix.dequantize(), stored.dequantize())
    assert ScaledMatrix.of(weight(8, 128, centred=True)) is None
    assert ScaledMatrix.of(weight(8, 256)) is None


@pytest.mark.parametrize("bits", [4, 8])
def test_embeddings_are_rows_of_the_matrix(bits: int) -> None:
    stored = weight(bits, 32)
    ids = torch.tensor([3, 0, 3])
    found = grouped_embedding(ids, GroupedMatrix.of(stored), torch.float32)
    assert torch.equal(found, stored.dequantize()[ids])


def close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert float((found.double() - expected).abs().max() / expected.abs().max()) < tolerance
