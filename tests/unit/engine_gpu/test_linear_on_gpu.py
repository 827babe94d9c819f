"""On a GPU projections of few bits are their references at the sizes of real models."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from services.engine.core import kernels
from services.engine.core.kernels import (
    OPS,
    GroupedMatrix,
    ScaledMatrix,
    cuda,
    grouped_linear,
    quantize_rows,
    registry,
    scaled_linear,
    triton,
)
from services.engine.core.kernels.cpu.packing import quantize_4, quantize_8

pytestmark = pytest.mark.gpu
# Outputs and inputs of Llama 3.1 8B, and of Qwen2 0.5B.
SHAPES = [(6144, 4096), (4096, 14336), (1152, 896)]
ROWS = [1, 7, 16, 33, 100, 256, 600]


@pytest.fixture(scope="module")
def gpu() -> torch.device:
    device = torch.device("cuda")
    triton.activate()
    cuda.activate(device)
    registry.select("cuda")
    return device


def close(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == expected.dtype == torch.bfloat16
    off = (found.float() - expected.float()).abs()
    largest = expected.float().abs().max()
    assert float((off - expected.float().abs() / 100).max() / largest) < 4e-3


def each_implementation(op: str) -> list[Callable[..., Tensor]]:
    return [each.run for each in OPS[op].implementations["cuda"] if each.unavailable() is None]


@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
@pytest.mark.parametrize("quantize", [quantize_4, quantize_8])
def test_weights_in_groups(
    quantize: Callable[..., object], outputs: int, inputs: int, gpu: object
) -> None:
    weight = torch.randn(outputs, inputs, device="cuda") / inputs**0.5
    matrix = GroupedMatrix.of(quantize(weight))  # type: ignore[arg-type]
    for rows in ROWS:
        hidden = torch.randn(rows, inputs, device="cuda").bfloat16()
        bias = torch.randn(outputs, device="cuda").bfloat16()
        expected = grouped_linear.reference(hidden, matrix, bias)
        for run in (grouped_linear, *each_implementation("grouped_linear")):
            close(run(hidden, matrix, bias), expected)


@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_eight_bits_by_eight(dtype: torch.dtype, outputs: int, inputs: int, gpu: object) -> None:
    matrix = ScaledMatrix.rounded(torch.randn(outputs, inputs, device="cuda"), dtype)
    for rows in ROWS:
        elements, scales = quantize_rows(torch.randn(rows, inputs, device="cuda").bfloat16(), dtype)
        arguments = elements, scales, matrix, None, torch.bfloat16
        expected = scaled_linear.reference(*arguments)
        for run in (scaled_linear, *each_implementation("scaled_linear")):
            close(run(*arguments), expected)


def test_a_projection_can_be_captured(gpu: object) -> None:
    matrix = GroupedMatrix.of(quantize_4(torch.randn(4096, 4096, device="cuda")))
    for rows in (1, 100, 600):
        hidden = torch.randn(rows, 4096, device="cuda").bfloat16()
        expected = kernels.grouped_linear(hidden, matrix, None)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = kernels.grouped_linear(hidden, matrix, None)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(found, expected)
