"""Norms, activations and rounding in Triton give what their references give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from services.engine.core.kernels import (
    Op,
    add_rms_norm,
    add_rms_norm_quantized,
    gelu_tanh,
    gelu_tanh_and_mul,
    layer_norm,
    quantize_rows,
    rms_norm,
    rms_norm_of_rows,
    scaled_linear,
    silu_and_mul,
)
from services.engine.core.kernels.gated_linear import GATES, gated_scaled_linear
from services.engine.core.kernels.matrices import ScaledMatrix
from services.engine.core.kernels.quantized_rows import LARGEST

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EIGHT_BITS = [torch.int8, torch.float8_e4m3fn]
SIZES = st.sampled_from([1, 7, 16, 48, 64, 96, 128, 200, 1024, 1536])
CASES = settings(max_examples=12, deadline=None)


def triton(op: Op[..., Any]) -> Callable[..., Any]:
    """The op's form in Triton."""
    (found,) = [each for each in op.implementations["cuda"] if each.name == "triton"]
    return found.run


def strided(shape: tuple[int, ...], dtype: torch.dtype, gap: int) -> Tensor:
    """A random tensor whose rows lie `gap` elements apart, with NaN between them."""
    whole = torch.full((*shape[:-1], shape[-1] + gap), float("nan"), dtype=dtype)
    whole[..., : shape[-1]] = torch.randn(shape)
    return whole[..., : shape[-1]]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not written is NaN, or in eight bits something that no row begins with."""

    def empty(*shape: Any, **options: Any) -> Tensor:
        made = torch.zeros(*shape, **options)
        return made.fill_(float("nan")) if made.is_floating_point() else made.fill_(-128)

    def empty_like(tensor: Tensor, **options: Any) -> Tensor:
        return torch.full_like(tensor, float("nan"), **options)

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch, "empty_like", empty_like)


def assert_same(found: Tensor, expected: Tensor, roundings: int = 1) -> None:
    """Equal but for the last bits of what is kept, so many times on the way."""
    assert found.dtype == expected.dtype
    once = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[expected.dtype]
    precision = roundings * once
    torch.testing.assert_close(found, expected, atol=precision, rtol=precision)


@CASES
@given(rows=st.integers(0, 9), size=SIZES, dtype=st.sampled_from(DTYPES), gap=st.integers(0, 9))
def test_rms_norm(rows: int, size: int, dtype: torch.dtype, gap: int) -> None:
    hidden, weight = strided((rows, size), dtype, gap), torch.randn(size).to(dtype)
    found = triton(rms_norm)(hidden, weight, 1e-5)
    assert found.is_contiguous()
    assert_same(found, rms_norm.reference(hidden, weight, 1e-5))


@CASES
@given(tokens=st.integers(0, 5), heads=st.integers(1, 5), size=SIZES, dtype=st.sampled_from(DTYPES))
def test_rms_norm_of_heads(tokens: int, heads: int, size: int, dtype: torch.dtype) -> None:
    hidden = strided((tokens, heads + 2, size), dtype, 0)[:, 1:-1]
    weight = torch.randn(size).to(dtype)
    found = triton(rms_norm)(hidden, weight, 1e-5)
    assert_same(found, rms_norm.reference(hidden, weight, 1e-5))


@CASES
@given(rows=st.integers(0, 9), size=SIZES, dtype=st.sampled_from(DTYPES), gap=st.integers(0, 9))
def test_add_rms_norm_writes_the_sum_into_the_residual(
    rows: int, size: int, dtype: torch.dtype, gap: int
) -> None:
    hidden, residual = strided((rows, size), dtype, gap), strided((rows, size), dtype, 3)
    weight = torch.randn(size).to(dtype)
    expected, expected_total = add_rms_norm.reference(hidden, residual, weight, 1e-5)
    found, total = triton(add_rms_norm)(hidden, residual, weight, 1e-5)
    assert total is residual
    assert torch.equal(total, expected_total)
    assert_same(found, expected)


@CASES
@given(rows=st.integers(0, 9), size=SIZES, dtype=st.sampled_from(DTYPES), gap=st.integers(0, 9))
def test_layer_norm(rows: int, size: int, dtype: torch.dtype, gap: int) -> None:
    hidden = strided((rows, size), dtype, gap) + 3
    weight, bias = torch.randn(2, size).to(dtype)
    found = triton(layer_norm)(hidden, weight, bias, 1e-5)
    assert_same(found, layer_norm.reference(hidden, weight, bias, 1e-5))


def test_long_rows() -> None:
    for size in (5120, 16384, 20000):
        hidden, weight = torch.randn(2, size), torch.randn(size)
        expected = rms_norm.reference(hidden, weight, 1e-5)
        torch.testing.assert_close(triton(rms_norm)(hidden, weight, 1e-5), expected)
        expected = layer_norm.reference(hidden, weight, weight, 1e-5)
        torch.testing.assert_close(triton(layer_norm)(hidden, weight, weight, 1e-5), expected)


def test_what_is_not_served_goes_to_the_references() -> None:
    hidden, weight = torch.randn(3, 8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    expected = rms_norm.reference(hidden, weight, 1e-5)
    assert torch.equal(triton(rms_norm)(hidden, weight, 1e-5), expected)
    columns = torch.randn(8, 3).t()
    expected = rms_norm.reference(columns, weight.float(), 1e-5)
    assert torch.equal(triton(rms_norm)(columns, weight.float(), 1e-5), expected)


def assert_same_rows(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """Scales that are equal but for their last bits; elements but for one step, and that where
    what was rounded may have been another's neighbour."""
    (elements, scales), (expected_elements, expected_scales) = found, expected
    assert elements.dtype == expected_elements.dtype
    torch.testing.assert_close(scales, expected_scales, atol=1e-12, rtol=8e-3)
    step = 1.0 if elements.dtype == torch.int8 else 32.0
    difference = (elements.float() - expected_elements.float()).abs()
    assert not difference.isnan().any()
    assert (difference <= step).all()
    assert (difference > 0).float().mean() < 0.02


@CASES
@given(
    rows=st.integers(1, 9),
    size=SIZES,
    dtype=st.sampled_from(DTYPES),
    to=st.sampled_from(EIGHT_BITS),
    gap=st.integers(0, 9),
)
def test_quantize_rows_is_exact(
    rows: int, size: int, dtype: torch.dtype, to: torch.dtype, gap: int
) -> None:
    hidden = strided((rows, size), dtype, gap)
    hidden[0] = 0
    elements, scales = triton(quantize_rows)(hidden, to)
    expected, expected_scales = quantize_rows.reference(hidden, to)
    torch.testing.assert_close(scales, expected_scales, atol=0, rtol=2e-7)
    assert torch.equal(elements.float(), expected.float())
    assert elements.float().abs().max() <= LARGEST[to]


@CASES
@given(
    rows=st.integers(1, 9),
    size=st.sampled_from([64, 128, 200, 1536]),
    dtype=st.sampled_from(DTYPES),
    to=st.sampled_from(EIGHT_BITS),
)
def test_add_rms_norm_quantized(rows: int, size: int, dtype: torch.dtype, to: torch.dtype) -> None:
    hidden, residual = strided((rows, size), dtype, 5), strided((rows, size), dtype, 3)
    weight = torch.randn(size).to(dtype)
    *expected, expected_total = add_rms_norm_quantized.reference(hidden, residual, weight, 1e-5, to)
    normed, _ = triton(add_rms_norm)(hidden, residual.clone(), weight, 1e-5)
    *found, total = triton(add_rms_norm_quantized)(hidden, residual, weight, 1e-5, to)
    assert total is residual
    assert torch.equal(total, expected_total)
    assert_same_rows((found[0], found[1]), (expected[0], expected[1]))
    # To the bit what the norm leaves and the next kernel rounds.
    elements, scales = triton(quantize_rows)(normed, to)
    assert torch.equal(found[0].view(torch.uint8), elements.view(torch.uint8))
    assert torch.equal(found[1], scales)


@pytest.mark.parametrize("to", [None, *EIGHT_BITS])
@CASES
@given(
    rows=st.integers(1, 9),
    size=st.sampled_from([64, 200, 1536]),
    dtype=st.sampled_from(DTYPES),
)
def test_what_is_added_may_be_normed_before(
    to: torch.dtype | None, rows: int, size: int, dtype: torch.dtype
) -> None:
    hidden, residual = strided((rows, size), dtype, 5), strided((rows, size), dtype, 3)
    before, weight = (torch.randn(size).to(dtype) for _ in range(2))
    own = triton(rms_norm)(hidden, before, 1e-5)
    assert_same(own, rms_norm.reference(hidden, before, 1e-5))
    expected, expected_total = triton(add_rms_norm)(own, residual.clone(), weight, 1e-5)
    if to is None:
        found, total = triton(add_rms_norm)(hidden, residual, weight, 1e-5, before)
        assert torch.equal(found, expected)
    else:
        elements, scales, total = triton(add_rms_norm_quantized)(
            hidden, residual, weight, 1e-5, to, before
        )
        assert_same_rows((elements, scales), quantize_rows.reference(expected, to))
    assert total is residual
    assert torch.equal(total, expected_total)


@CASES
@given(
    rows=st.integers(1, 9),
    size=st.sampled_from([64, 200, 1536]),
    dtype=st.sampled_from(DTYPES),
    is_added=st.booleans(),
)
def test_norms_of_some_rows(rows: int, size: int, dtype: torch.dtype, is_added: bool) -> None:
    hidden, added = strided((rows, size), dtype, 5), strided((rows, size), dtype, 3)
    before, weight = (torch.randn(size).to(dtype) for _ in range(2))
    chosen = torch.randint(rows, (rows + 2,))
    more = (added, before) if is_added else ()
    stream = hidden.clone()
    found = triton(rms_norm_of_rows)(hidden, chosen, weight, 1e-5, *more)
    assert_same(found, rms_norm_of_rows.reference(stream, chosen, weight, 1e-5, *more))
    assert torch.equal(hidden, stream), "several rows may be the same one"


@pytest.mark.parametrize("activation", GATES)
@CASES
@given(
    rows=st.integers(0, 9),
    size=st.sampled_from([32, 72, 200]),
    dtype=st.sampled_from(DTYPES),
    to=st.sampled_from(EIGHT_BITS),
)
def test_gated_rows_are_rounded_as_if_they_had_been_stored(
    activation: str, rows: int, size: int, dtype: torch.dtype, to: torch.dtype
) -> None:
    elements, scales = quantize_rows.reference(torch.randn(rows, 48), to)
    weight = ScaledMatrix.rounded(torch.randn(2 * size, 48), to)
    args = elements, scales, weight, None, dtype
    gated = triton(GATES[activation])(scaled_linear.reference(*args))
    expected, expected_scales = quantize_rows.reference(gated, to)
    found, found_scales = triton(gated_scaled_linear)(*args, activation)
    assert torch.equal(found.float(), expected.float())
    torch.testing.assert_close(found_scales, expected_scales, atol=0, rtol=2e-7)


@pytest.mark.parametrize("op", [silu_and_mul, gelu_tanh_and_mul])
@CASES
@given(rows=st.integers(0, 9), size=SIZES, dtype=st.sampled_from(DTYPES), gap=st.integers(0, 9))
def test_gates(op: Op[..., Any], rows: int, size: int, dtype: torch.dtype, gap: int) -> None:
    gate_up = strided((rows, 2 * size), dtype, gap) * 4
    assert_same(triton(op)(gate_up), op.reference(gate_up), roundings=2)


@CASES
@given(rows=st.integers(0, 9), size=SIZES, dtype=st.sampled_from(DTYPES), gap=st.integers(0, 9))
def test_gelu(rows: int, size: int, dtype: torch.dtype, gap: int) -> None:
    hidden = strided((rows, size), dtype, gap) * 4
    assert_same(triton(gelu_tanh)(hidden), gelu_tanh.reference(hidden))


def test_gates_of_large_inputs_do_not_overflow() -> None:
    gate_up = torch.tensor([[-1e4, -100.0, 100.0, 1e4, 1.0, 1.0, 1.0, 1.0]])
    for op in (silu_and_mul, gelu_tanh_and_mul):
        assert_same(triton(op)(gate_up), op.reference(gate_up))
