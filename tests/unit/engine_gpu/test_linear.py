"""Projections of few bits in Triton are their references, whatever the shape."""

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
from services.engine.core.kernels.cpu.packing import GroupedWeight
from services.engine.core.kernels.triton import linear_grouped, linear_scaled, linear_splits

# Of one tile and of several, whole and not; those in the middle of a tile's inputs end a group.
SHAPES = [(1, 64, 128), (3, 70, 96), (17, 40, 288), (40, 136, 64), (65, 48, 96), (130, 150, 64)]
LONG = [(1, 40, 4096), (2, 16, 1056)]


def random_matrix(
    outputs: int, inputs: int, bits: int, *, group: int = 32, has_minima: bool = True
) -> GroupedMatrix:
    """As a checkpoint's, with a scale for each group of `group` inputs."""
    levels = torch.randint(0, 1 << bits, (outputs, inputs), dtype=torch.uint8)
    scales = (torch.rand(outputs, inputs // group) / 16 + 0.01).half()
    minima = torch.randn(scales.shape).half() / 4 if has_minima else scales * -(1 << bits - 1)
    scales, minima = (each.repeat_interleave(group // 32, 1) for each in (scales, minima))
    return GroupedMatrix.of(GroupedWeight(levels, scales, minima, bits))


def assert_close(found: Tensor, expected: Tensor, roundings: int = 1) -> None:
    """Up to the rounding of what is stored, so many times: sums differ in their order alone."""
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    off = (found.double() - expected.double()).abs()
    allowed = expected.double().abs() / 128 + expected.double().abs().max() * 2e-3
    assert (off <= roundings * allowed).all(), float((off - allowed).max())


@pytest.mark.parametrize(("rows", "outputs", "inputs"), SHAPES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("has_minima", [True, False])
def test_weights_in_groups_are_multiplied_as_what_they_stand_for(
    rows: int, outputs: int, inputs: int, bits: int, has_minima: bool
) -> None:
    matrix = random_matrix(outputs, inputs, bits, has_minima=has_minima)
    assert (matrix.minima is not None) == has_minima
    hidden, bias = torch.randn(rows, inputs).bfloat16(), torch.randn(outputs).bfloat16()
    for own in (bias, None):
        found = linear_grouped.grouped_linear_triton(hidden, matrix, own)
        assert_close(found, grouped_linear.reference(hidden, matrix, own))


@pytest.mark.parametrize("group", [64, 128])
@pytest.mark.parametrize("rows", [5, 70])
@pytest.mark.parametrize("bits", [4, 8])
def test_groups_may_be_larger_than_tiles_and_smaller(group: int, rows: int, bits: int) -> None:
    matrix = random_matrix(40, 384, bits, group=group)
    assert matrix.group_size == group
    hidden = torch.randn(rows, 384).half()
    found = linear_grouped.grouped_linear_triton(hidden, matrix, None)
    assert_close(found, grouped_linear.reference(hidden, matrix, None))


@pytest.mark.parametrize(("rows", "outputs", "inputs"), LONG)
@pytest.mark.parametrize("bits", [4, 8])
def test_products_of_few_rows_are_split_and_the_same_each_time(
    rows: int, outputs: int, inputs: int, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix = random_matrix(outputs, inputs, bits)
    hidden, bias = torch.randn(rows, inputs).bfloat16(), torch.randn(outputs).bfloat16()
    sums: list[int] = []
    monkeypatch.setattr(linear_splits, "sum_splits", counting(sums))
    found = linear_grouped.grouped_linear_triton(hidden, matrix, bias)
    assert sums[0] > 1
    assert_close(found, grouped_linear.reference(hidden, matrix, bias))
    assert torch.equal(found, linear_grouped.grouped_linear_triton(hidden, matrix, bias))


def counting(sums: list[int]):  # type: ignore[no-untyped-def]
    original = linear_splits.sum_splits

    def sum_splits(parts: Tensor, bias: Tensor | None, output: Tensor) -> None:
        sums.append(len(parts))
        original(parts, bias, output)

    return sum_splits


def test_rows_of_a_wider_tensor_are_read_where_they_lie() -> None:
    matrix = random_matrix(32, 64, 4)
    wide = torch.randn(6, 160).bfloat16()
    hidden = wide[:, 32:96]
    found = linear_grouped.grouped_linear_triton(hidden, matrix, None)
    assert_close(found, grouped_linear.reference(hidden, matrix, None))


@pytest.mark.parametrize("bits", [4, 8])
def test_many_rows_are_multiplied_slice_by_slice(
    bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_grouped, "FLOATS_FROM_ROWS", 8)
    monkeypatch.setattr(linear_grouped, "_SLICE_BYTES", 1)
    matrix = random_matrix(140, 32, bits)
    hidden, bias = torch.randn(9, 32).bfloat16(), torch.randn(140).bfloat16()
    for own in (bias, None):
        found = linear_grouped.grouped_linear_triton(hidden, matrix, own)
        assert_close(found, grouped_linear.reference(hidden, matrix, own))


def test_no_rows_give_no_rows() -> None:
    matrix = random_matrix(32, 64, 4)
    assert linear_grouped.grouped_linear_triton(torch.empty(0, 64).half(), matrix, None).shape == (
        0,
        32,
    )


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 128])
def test_embeddings_are_looked_up_exactly(bits: int, group: int) -> None:
    matrix = random_matrix(50, 2304, bits, group=group)
    ids = torch.tensor([7, 49, 0, 7])
    found = linear_grouped.grouped_embedding_triton(ids, matrix, torch.bfloat16)
    assert torch.equal(found, grouped_embedding.reference(ids, matrix, torch.bfloat16))


@pytest.mark.parametrize(("rows", "outputs", "inputs"), [*SHAPES, *LONG])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_eight_bits_are_multiplied_by_eight(
    rows: int, outputs: int, inputs: int, dtype: torch.dtype
) -> None:
    matrix = ScaledMatrix.rounded(torch.randn(outputs, inputs), dtype)
    elements, scales = quantize_rows.reference(torch.randn(rows, inputs), dtype)
    bias = torch.randn(outputs).bfloat16()
    for own in (bias, None):
        arguments = elements, scales, matrix, own, torch.bfloat16
        expected = scaled_linear.reference(*arguments)
        assert_close(linear_scaled.scaled_linear_triton(*arguments), expected)
        assert_close(linear_scaled.scaled_linear_cutlass(*arguments), expected)


def test_sums_of_bytes_are_exact_beyond_what_floats_hold() -> None:
    matrix = ScaledMatrix(torch.randint(90, 128, (16, 4096), dtype=torch.int8), torch.rand(16))
    elements = torch.randint(90, 128, (3, 4096), dtype=torch.int8)
    arguments = elements, torch.rand(3), matrix, None, torch.float32
    expected = scaled_linear.reference(*arguments)
    found = linear_scaled.scaled_linear_triton(*arguments)
    torch.testing.assert_close(found, expected, rtol=2e-7, atol=0)
