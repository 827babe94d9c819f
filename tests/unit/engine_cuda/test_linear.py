"""Matrix products of few rows in CUDA C++ give what the references give."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from services.engine.core.kernels import choice
from services.engine.core.kernels.cuda.linear import (
    gated_linear_cuda,
    gated_scaled_linear_cuda,
    grouped_linear_cuda,
    launch,
    linear_cuda,
    scaled_linear_cuda,
    serves,
)
from services.engine.core.kernels.gated_linear import gated_linear, gated_scaled_linear
from services.engine.core.kernels.linear import grouped_linear, linear, scaled_linear
from services.engine.core.kernels.matrices import GroupedMatrix, Matrix, ScaledMatrix
from services.engine.core.kernels.quantized_rows import quantize_rows
from tests.fakes.cuda.emulator import Emulator, guarded

DTYPES = [torch.bfloat16, torch.float16]
# Rounding of the result alone, which is all the kernels round: relative, of norms.
ROUNDING = {torch.bfloat16: 2.5e-3, torch.float16: 4e-4}
# Rows, outputs and inputs: of every form of the kernels, with tiles that are not full, and with
# inputs that blocks split.
SHAPES = [
    *((1, 16, 1024), (1, 40, 128), (3, 16, 256), (8, 48, 1152), (9, 33, 512), (16, 64, 640)),
    *((17, 70, 256), (32, 128, 640), (33, 130, 256), (64, 256, 640), (1, 32, 8192)),
]


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    return guarded(torch.randn(*shape).to(dtype))


def grouped(outputs: int, inputs: int, bits: int, size: int, *, minima: bool) -> GroupedMatrix:
    levels = torch.randint(0, 256, (outputs, inputs * bits // 8), dtype=torch.uint8)
    scales = guarded((torch.rand(outputs, inputs // size) + 0.1).half())
    least = guarded(torch.randn(outputs, inputs // size).half()) if minima else None
    return GroupedMatrix(guarded(levels), scales, least, bits)


def close(found: Tensor, exact: Tensor) -> None:
    assert found.shape == exact.shape
    error = (found.double() - exact).norm() / exact.norm()
    assert error < ROUNDING[found.dtype], error


@pytest.fixture(autouse=True)
def everything_is_streamed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(choice, "_STREAMED", dict.fromkeys(choice._STREAMED, choice.MAX_ROWS))
    yield
    choice.forget()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "outputs", "inputs"), [*SHAPES, (2, 24, 72), (20, 16, 1032)])
def test_weights_of_the_precision_of_activations(
    emulated: Emulator, rows: int, outputs: int, inputs: int, dtype: torch.dtype
) -> None:
    hidden, weight = random(rows, inputs, dtype=dtype), random(outputs, inputs, dtype=dtype)
    bias = random(outputs, dtype=dtype)
    assert serves(hidden, weight)
    close(linear_cuda(hidden, weight, None), hidden.double() @ weight.double().T)
    exact = hidden.double() @ weight.double().T + bias.double()
    close(linear_cuda(hidden, weight, bias), exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("minima", [False, True], ids=["centred", "minima"])
@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_levels_in_groups(
    emulated: Emulator, bits: int, size: int, minima: bool, dtype: torch.dtype
) -> None:
    for rows, outputs, inputs in SHAPES[:: 1 if dtype == torch.bfloat16 else 3]:
        hidden = random(rows, inputs, dtype=dtype)
        weight = grouped(outputs, inputs, bits, size, minima=minima)
        assert serves(hidden, weight)
        # More exact than the reference, which rounds weights.
        close(
            grouped_linear_cuda(hidden, weight, None),
            hidden.double() @ weight.dequantize().double().T,
        )


@pytest.mark.parametrize("bits", [4, 8])
def test_every_level_is_its_number(emulated: Emulator, bits: int) -> None:
    levels = torch.arange(256, dtype=torch.uint8).repeat(16, bits // 4)
    inputs = levels.shape[1] * 8 // bits
    weight = GroupedMatrix(levels, torch.ones(16, inputs // 128).half(), None, bits)
    one_of_each = torch.zeros(64, inputs, dtype=torch.bfloat16)
    for start in range(0, inputs, 64):
        hidden = one_of_each.clone()
        hidden[:, start : start + 64].fill_diagonal_(1)
        found = grouped_linear_cuda(hidden, weight, None)
        assert torch.equal(found, grouped_linear.reference(hidden, weight, None))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize(("rows", "outputs", "inputs"), SHAPES)
def test_weights_and_activations_of_eight_bits(
    emulated: Emulator, rows: int, outputs: int, inputs: int, dtype: torch.dtype
) -> None:
    elements, scales = quantize_rows(torch.randn(rows, inputs), dtype)
    weight = ScaledMatrix.rounded(torch.randn(outputs, inputs), dtype)
    bias = random(outputs, dtype=torch.bfloat16)
    assert serves(elements, weight)
    found = scaled_linear_cuda(elements, scales, weight, bias, torch.bfloat16)
    expected = scaled_linear.reference(elements, scales, weight, bias, torch.bfloat16)
    torch.testing.assert_close(found, expected, atol=0, rtol=2**-7)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(1, 80, 1024), (20, 72, 256)])
def test_gates_and_residuals_are_part_of_a_product(
    emulated: Emulator, rows: int, outputs: int, inputs: int, activation: str
) -> None:
    dtype = torch.bfloat16
    hidden, bias = random(rows, inputs, dtype=dtype), random(outputs, dtype=dtype)
    weight = guarded((torch.randn(outputs, inputs) / 16).to(dtype))
    residual = random(rows, outputs // 2, dtype=dtype)
    found = launch(hidden, weight, bias, dtype, activation=activation, residual=residual)
    gate, up = (hidden.double() @ weight.double().T + bias.double()).chunk(2, dim=-1)
    gated = (
        functional.silu(gate) if activation == "silu" else functional.gelu(gate, approximate="tanh")
    )
    close(found, gated * up + residual.double())


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("rows", [2, 65])
def test_a_gated_projection_is_one_where_it_is_streamed(
    emulated: Emulator, rows: int, activation: str
) -> None:
    hidden = random(rows, 256, dtype=torch.bfloat16)
    whole = guarded((torch.randn(48, 256) / 16).bfloat16())
    for weight in (whole, grouped(48, 256, 4, 64, minima=False)):
        found = gated_linear_cuda(hidden, weight, None, activation)
        expected = gated_linear.reference(hidden, weight, None, activation)
        torch.testing.assert_close(found, expected, atol=0.02 * float(expected.abs().max()), rtol=0)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("rows", [2, 65])
def test_a_gated_projection_of_eight_bits_is_rounded_again(
    emulated: Emulator, rows: int, dtype: torch.dtype
) -> None:
    elements, scales = quantize_rows(torch.randn(rows, 256), dtype)
    weight = ScaledMatrix.rounded(torch.randn(48, 256) / 16, dtype)
    bias = random(48, dtype=torch.bfloat16)
    args = elements, scales, weight, bias, torch.bfloat16, "silu"
    found, found_scales = gated_scaled_linear_cuda(*args)
    expected, expected_scales = gated_scaled_linear.reference(*args)
    assert found.dtype == dtype
    values, exact = (
        of.float() * by[:, None] for of, by in ((found, found_scales), (expected, expected_scales))
    )
    # Gate and up are rounded on the way in the reference, so that some are the next step's.
    step = 0.01 if dtype == torch.int8 else 0.07
    torch.testing.assert_close(values, exact, atol=step * float(exact.abs().max()), rtol=0)


@pytest.mark.parametrize("rows", [1, 12, 64])
def test_sums_are_the_same_in_every_order_of_blocks_and_warps(
    emulated: Emulator, rows: int
) -> None:
    hidden, weight = (random(size, 4096, dtype=torch.bfloat16) for size in (rows, 48))
    expected = linear_cuda(hidden, weight, None)
    for seed in range(1, 4):
        with emulated.schedule(seed):
            assert torch.equal(linear_cuda(hidden, weight, None), expected)


def test_rows_and_weights_may_lie_apart(emulated: Emulator) -> None:
    hidden = random(5, 320, dtype=torch.bfloat16)[:, 64:192]
    weight = random(40, 256, dtype=torch.bfloat16)[:, :128]
    assert serves(hidden, weight)
    close(linear_cuda(hidden, weight, None), hidden.double() @ weight.double().T)


@pytest.mark.parametrize(
    ("hidden", "weight"),
    [
        (torch.randn(65, 64).bfloat16(), torch.randn(8, 64).bfloat16()),  # many rows
        (torch.randn(2, 60).bfloat16(), torch.randn(8, 60).bfloat16()),  # rows of 120 bytes
        (torch.randn(2, 64), torch.randn(8, 64)),  # float32
        (torch.randn(0, 64).bfloat16(), torch.randn(8, 64).bfloat16()),  # no rows
    ],
)
def test_what_it_does_not_serve_it_hands_on(
    emulated: Emulator, hidden: Tensor, weight: Matrix
) -> None:
    assert not serves(hidden, weight)
    assert isinstance(weight, Tensor)
    assert torch.equal(linear_cuda(hidden, weight, None), linear.reference(hidden, weight, None))


def test_levels_whose_groups_do_not_fill_a_step_are_handed_on(emulated: Emulator) -> None:
    hidden, weight = torch.randn(2, 96).bfloat16(), grouped(16, 96, 4, 32, minima=False)
    assert not serves(hidden, weight)
    expected = grouped_linear.reference(hidden, weight, None)
    torch.testing.assert_close(grouped_linear_cuda(hidden, weight, None), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 5, 16, 32, 64])
@pytest.mark.parametrize(
    ("outputs", "inputs"),
    [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (1024, 3072), (4096, 1024)],
)
def test_products_of_real_shapes_on_a_card(rows: int, outputs: int, inputs: int) -> None:
    from services.engine.core.kernels import cuda

    device = torch.device("cuda")
    cuda.activate(device)
    hidden = torch.randn(rows, inputs, device=device, dtype=torch.bfloat16)
    weight = torch.randn(outputs, inputs, device=device, dtype=torch.bfloat16)
    close(linear_cuda(hidden, weight, None), hidden.double() @ weight.double().T)
    for bits in (4, 8):
        own = grouped(outputs, inputs, bits, 128, minima=bits == 4)
        on_device = GroupedMatrix(
            own.levels.to(device),
            own.scales.to(device),
            None if own.minima is None else own.minima.to(device),
            bits,
        )
        exact = hidden.double() @ on_device.dequantize().double().T
        close(grouped_linear_cuda(hidden, on_device, None), exact)
    for dtype in (torch.int8, torch.float8_e4m3fn):
        elements, scales = quantize_rows.reference(hidden, dtype)
        scaled = ScaledMatrix.rounded(weight.float(), dtype)
        found = scaled_linear_cuda(elements, scales, scaled, None, torch.bfloat16)
        expected = scaled_linear.reference(elements, scales, scaled, None, torch.bfloat16)
        torch.testing.assert_close(found, expected, atol=0, rtol=2**-7)
