"""Matrices are rounded to grids that files and kernels hold exactly, with errors made up for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from services.engine.core.quantization.gptq import round_with_compensation, row_errors
from services.engine.core.quantization.grid import Rounded, fit_grid, round_to_nearest
from services.engine.core.quantization.writing import packed_parts
from services.engine.core.weights.compressed_tensors import CompressedTensors


def random_matrix(outputs: int = 48, inputs: int = 256, seed: int = 0) -> Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed)) * 0.05


def output_error(weight: Tensor, rounded: Rounded, inputs: Tensor) -> float:
    return float((inputs @ (rounded.dequantize() - weight).T).square().mean())


@pytest.mark.parametrize("bits", [4, 8])
def test_no_weight_within_the_grid_is_off_by_more_than_half_a_level(bits: int) -> None:
    weight = random_matrix()
    grid = fit_grid(weight, bits)
    levels = grid.levels(weight)
    inner = (levels > 0) & (levels < 2**bits - 1)
    steps = grid.scales.abs().repeat_interleave(32, dim=1)
    off = (grid.values(levels) - weight).abs()
    assert (off <= 0.5001 * steps)[inner].all()


@pytest.mark.parametrize("bits", [4, 8])
def test_scales_are_the_same_as_bf16_and_as_halves(bits: int) -> None:
    weight = torch.cat((random_matrix(), random_matrix(seed=1) * 1e-3, torch.zeros(4, 256)))
    rounded = round_to_nearest(weight, bits)
    scales = rounded.grid.scales
    assert torch.equal(scales.to(torch.bfloat16).half().float(), scales)
    assert not rounded.dequantize()[-4:].any()


def test_a_width_between_the_extremes_is_taken_where_it_has_less_error() -> None:
    weight = random_matrix()
    weight[:, 5] = 0.3  # far out, and of no importance
    importance = torch.ones(256)
    importance[5] = 0.0
    kept, narrowed = fit_grid(weight, 4), fit_grid(weight, 4, importance)
    assert (narrowed.scales[:, 0].abs() < kept.scales[:, 0].abs()).float().mean() > 0.5


def test_compensation_takes_off_most_of_the_error_that_inputs_have_in_common() -> None:
    weight = random_matrix()
    generator = torch.Generator().manual_seed(3)
    # Inputs of 256 dimensions that lie near 32 of them, as those of a layer do.
    inputs = torch.randn(4096, 32, generator=generator) @ torch.randn(32, 256, generator=generator)
    inputs += 0.1 * torch.randn(4096, 256, generator=generator)
    compensated = round_with_compensation(weight, 4, inputs.T @ inputs)
    nearest = round_to_nearest(weight, 4)
    fresh = inputs.flip(0) * 0.5
    assert output_error(weight, compensated, fresh) < 0.5 * output_error(weight, nearest, fresh)


def test_the_further_level_is_on_the_side_of_the_largest_weight() -> None:
    weight = random_matrix(inputs=32).clamp(-0.05, 0.05)
    weight[:24, 0], weight[24:, 0] = -0.08, 0.08
    rounded = round_to_nearest(weight, 4)
    # Eight levels to the one side, seven to the other.
    assert torch.equal(rounded.grid.scales[:, 0] > 0, weight[:, 0] < 0)


@given(
    seed=st.integers(0, 2**16),
    inputs=st.sampled_from([32, 96, 256]),
    rank=st.integers(1, 64),
    tokens=st.sampled_from([1, 40, 400]),
)
@settings(deadline=None, max_examples=30)
def test_no_output_is_worse_on_calibration_than_rounded_to_nearest(
    seed: int, inputs: int, rank: int, tokens: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = random_matrix(16, inputs, seed)
    seen = torch.randn(tokens, rank, generator=generator) @ torch.randn(
        rank, inputs, generator=generator
    )
    products = seen.T @ seen
    compensated = round_with_compensation(weight, 4, products)
    errors = row_errors(weight, compensated.dequantize(), products)
    nearest = row_errors(weight, round_to_nearest(weight, 4).dequantize(), products)
    assert (errors <= nearest).all()
    assert compensated.levels.max() <= 15
    scales = compensated.grid.scales
    assert torch.equal(scales.to(torch.bfloat16).half().float(), scales)
    assert scales.all()


def test_inputs_that_never_came_are_rounded_all_the_same() -> None:
    weight = random_matrix()
    rounded = round_with_compensation(weight, 4, torch.zeros(256, 256))
    steps = rounded.grid.scales.abs().repeat_interleave(32, dim=1)
    assert ((rounded.dequantize() - weight).abs() <= 2.0 * steps).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_what_is_written_is_read_with_the_very_same_values(bits: int) -> None:
    rounded = round_to_nearest(random_matrix(), bits)
    parts = packed_parts("up", rounded, slice(8, 40))
    stored = CompressedTensors((4, 8), 32).read(
        {name.removeprefix("up."): part for name, part in parts.items()}
    )
    assert torch.equal(stored.dequantize(), rounded.dequantize()[8:40])
    grouped = stored.grouped()
    assert grouped.bits == bits
    assert not grouped.is_rounded
