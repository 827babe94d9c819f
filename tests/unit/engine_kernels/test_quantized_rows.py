"""Rows of eight bits stand for what they were rounded from."""

from __future__ import annotations

import pytest
import torch

from services.engine.core.kernels import add_rms_norm, add_rms_norm_quantized, quantize_rows
from services.engine.core.kernels.quantized_rows import LARGEST

FORMATS = [torch.int8, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", FORMATS)
def test_a_row_fills_the_range_of_its_format(dtype: torch.dtype) -> None:
    hidden = torch.randn(5, 64) * torch.tensor([1e-6, 1e-2, 1.0, 10.0, 1e6])[:, None]
    elements, scales = quantize_rows(hidden, dtype)
    assert elements.dtype == dtype
    assert elements.float().abs().amax(-1).tolist() == [LARGEST[dtype]] * 5
    found = elements.float() * scales[:, None]
    # Half a step: of all elements alike, or of three bits behind the first.
    step = scales[:, None] if dtype == torch.int8 else hidden.abs() / 8 + scales[:, None] * 2**-9
    assert ((found - hidden).abs() <= 0.501 * step).all()


@pytest.mark.parametrize("dtype", FORMATS)
def test_a_row_of_zeros_stays_one(dtype: torch.dtype) -> None:
    elements, scales = quantize_rows(torch.zeros(2, 16), dtype)
    assert not elements.float().any()
    assert not scales.any()


@pytest.mark.parametrize("dtype", FORMATS)
def test_what_is_normalised_is_rounded_as_rows_are(dtype: torch.dtype) -> None:
    hidden, residual, weight = torch.randn(3, 32), torch.randn(3, 32), torch.randn(32)
    normed, total = add_rms_norm(hidden, residual, weight, 1e-5)
    elements, scales, found_total = add_rms_norm_quantized(hidden, residual, weight, 1e-5, dtype)
    expected, expected_scales = quantize_rows(normed, dtype)
    assert torch.equal(elements.float(), expected.float())
    assert torch.equal(scales, expected_scales)
    assert torch.equal(found_total, total)
