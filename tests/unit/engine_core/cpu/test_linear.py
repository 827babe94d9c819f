"""The native linear layers against float64, within what the order of float additions may cost."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.engine.core.kernels.cpu.library import Library
from services.engine.core.kernels.cpu.packing import (
    GroupedWeight,
    pack_bf16,
    pack_grouped,
)
from services.engine.core.kernels.cpu.program import Epilogue
from tests.fakes.amx_processor import libraries_with_amx
from tests.fakes.native_linear import ROUNDING, Matrix, Norm, activations, random_grouped, run, sums

KERNELS = libraries_with_amx()
pytestmark = pytest.mark.skipif(not KERNELS, reason="no native kernels on this machine")

each_isa = pytest.mark.parametrize("kernels", KERNELS, ids=lambda each: each.isa)

FORMATS = ["bf16", "q8", "q8 with minima", "q4"]
each_format = pytest.mark.parametrize("weight_format", FORMATS)


@each_isa
@given(
    weight_format=st.sampled_from(FORMATS),
    num_rows=st.integers(1, 40),
    inputs=st.one_of(st.integers(1, 5), st.integers(1, 48)).map(lambda groups: 32 * groups),
    outputs=st.one_of(st.integers(1, 70), st.integers(1, 300)),
    biased=st.booleans(),
    threads=st.integers(1, 3),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_a_layer_computes_the_product_whatever_its_size(
    kernels: Library,
    weight_format: str,
    num_rows: int,
    inputs: int,
    outputs: int,
    biased: bool,
    threads: int,
    seed: int,
) -> None:
    rows = random_grouped(num_rows, inputs, seed=seed + 1)
    matrix = Matrix.random(weight_format, outputs, inputs, seed)
    bias = torch.randn(outputs) if biased else None
    weights = matrix.pack(bias=bias)

    found = run(kernels, rows, weights, threads=threads)

    added = torch.zeros(outputs) if bias is None else bias
    expected, bound = sums(kernels, weight_format, rows.dequantize(), matrix, added.double())
    assert ((found - expected).abs() <= bound).all()


@each_isa
@each_format
@pytest.mark.parametrize("size", [(1, 1), (2, 31), (7, 33), (13, 64), (40, 100)])
def test_a_layer_adds_to_the_residual_stream(
    kernels: Library, weight_format: str, size: tuple[int, int]
) -> None:
    num_rows, outputs = size
    rows, matrix = random_grouped(num_rows, 96), Matrix.random(weight_format, outputs, 96, seed=1)
    onto, bias = torch.randn(num_rows, outputs), torch.randn(outputs)

    found = run(kernels, rows, matrix.pack(bias=bias), epilogue=Epilogue.ADD, onto=onto)

    expected, bound = sums(kernels, weight_format, rows.dequantize(), matrix, bias.double())
    expected += onto
    assert ((found - expected).abs() <= bound + expected.abs() * ROUNDING).all()


@each_isa
@pytest.mark.parametrize("inputs", [32, 96, 576, 1_536])
def test_the_input_of_a_layer_is_normed(kernels: Library, inputs: int) -> None:
    rows, weight = random_grouped(5, inputs), torch.randn(inputs)
    identity = pack_bf16(torch.eye(inputs))

    found = run(kernels, rows, identity, norm=Norm(weight, 0.03))

    values = rows.dequantize().double()
    expected = values / (values.square().mean(-1, keepdim=True) + 0.03).sqrt() * weight
    rounding = 2**-8 if kernels.isa in ("amx", "avx512bf16") else 2**-20
    torch.testing.assert_close(found.double(), expected, rtol=rounding, atol=1e-30)


@each_isa
@each_format
def test_zeros_give_zeros(kernels: Library, weight_format: str) -> None:
    nothing = GroupedWeight(
        torch.full((3, 64), 128, dtype=torch.uint8), torch.ones(3, 2).half(), None, bits=8
    )
    weights = Matrix.random(weight_format, 40, 64, seed=1).pack()
    assert torch.equal(run(kernels, nothing, weights), torch.zeros(3, 40))


@each_isa
@each_format
@pytest.mark.parametrize("size", [1e-30, 1e-36, 1e-38, 1e-43])
def test_values_next_to_nothing_give_next_to_nothing(
    kernels: Library, weight_format: str, size: float
) -> None:
    """A group's scale is a number even where its inverse is none."""
    rows, weights = random_grouped(3, 64), Matrix.random(weight_format, 40, 64, seed=1).pack()
    found = run(kernels, rows, weights, norm=Norm(torch.full((64,), size), 1e-6))
    assert (found.abs() <= 64 * 8 * 10 * size).all()


@each_isa
@pytest.mark.parametrize("weight_format", ["q8", "q8 with minima"])
def test_products_at_the_ends_of_bytes_do_not_saturate(
    kernels: Library, weight_format: str
) -> None:
    ends = torch.tensor([0, 255], dtype=torch.uint8).repeat(2, 96)[:, :96]
    rows = GroupedWeight(ends, torch.full((2, 3), 1 / 128).half(), None, bits=8)
    levels = torch.stack((torch.full((96,), 255), torch.zeros(96), ends[0])).to(torch.uint8)
    minima = torch.zeros(3, 3).half() if weight_format == "q8 with minima" else None
    weight = GroupedWeight(levels, torch.ones(3, 3).half(), minima, bits=8)
    found = run(kernels, rows, pack_grouped(weight))
    inputs = activations(kernels, weight_format, rows.dequantize())
    expected = inputs @ weight.dequantize().double().T
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-3)
