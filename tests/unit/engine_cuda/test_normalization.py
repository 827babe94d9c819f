"""Root-mean-square normalisation in CUDA C++ gives what the reference gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from services.engine.core.kernels import cuda
from services.engine.core.kernels.cuda.normalization import add_rms_norm_cuda, rms_norm_cuda
from services.engine.core.kernels.normalization import add_rms_norm, rms_norm
from tests.fakes.cuda.emulator import Emulator, guarded

DTYPES = [torch.bfloat16, torch.float16]
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3}
EPS = 1e-5


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    return guarded(torch.randn(*shape).to(dtype))


def close(found: Tensor, expected: Tensor) -> None:
    bound = TOLERANCE[expected.dtype]
    torch.testing.assert_close(found, expected, atol=bound, rtol=bound)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size"), [(1, 512), (3, 584), (2, 1024), (1, 8200)])
def test_rows_are_normalised(emulated: Emulator, rows: int, size: int, dtype: torch.dtype) -> None:
    hidden, weight = random(rows, size, dtype=dtype), random(size, dtype=dtype)
    close(rms_norm_cuda(hidden, weight, EPS), rms_norm.reference(hidden, weight, EPS))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_residual_stream_is_added_to_in_place(emulated: Emulator, dtype: torch.dtype) -> None:
    hidden, residual = (random(3, 776, dtype=dtype) for _ in range(2))
    weight = random(776, dtype=dtype)
    normalised, total = add_rms_norm.reference(hidden, residual.clone(), weight, EPS)
    for seed in range(3):
        stream = guarded(residual)
        with emulated.schedule(seed):
            found, found_total = add_rms_norm_cuda(hidden, stream, weight, EPS)
        assert found_total.data_ptr() == stream.data_ptr()
        assert torch.equal(found_total, total)
        close(found, normalised)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [776, 8200])
def test_what_is_added_may_be_normed_before(
    emulated: Emulator, size: int, dtype: torch.dtype
) -> None:
    hidden, residual = (random(3, size, dtype=dtype) for _ in range(2))
    before, weight = (random(size, dtype=dtype) for _ in range(2))
    own = rms_norm_cuda(hidden, before, EPS)
    expected, expected_total = add_rms_norm_cuda(own, guarded(residual), weight, EPS)
    for seed in range(3):
        with emulated.schedule(seed):
            found, total = add_rms_norm_cuda(hidden, guarded(residual), weight, EPS, before)
        assert torch.equal(total, expected_total)
        assert torch.equal(found, expected)


def test_rows_of_a_wider_tensor_are_read_where_they_are(emulated: Emulator) -> None:
    wide, weight = random(4, 1536, dtype=torch.bfloat16), random(512, dtype=torch.bfloat16)
    rows = wide[:, 512:1024]
    close(rms_norm_cuda(rows, weight, EPS), rms_norm.reference(rows, weight, EPS))


@pytest.mark.parametrize(
    ("size", "dtype"), [(516, torch.bfloat16), (128, torch.bfloat16), (1024, torch.float32)]
)
def test_what_the_kernel_does_not_serve_is_computed_all_the_same(
    emulated: Emulator, size: int, dtype: torch.dtype
) -> None:
    hidden, weight = (torch.randn(2, size).to(dtype), torch.ones(size, dtype=dtype))
    found, total = add_rms_norm_cuda(hidden, hidden.clone(), weight, EPS)
    expected, expected_total = add_rms_norm.reference(hidden, hidden, weight, EPS)
    assert torch.equal(found, expected)
    assert torch.equal(total, expected_total)
    assert rms_norm_cuda(torch.empty(0, 64).bfloat16(), torch.ones(64).bfloat16(), EPS).numel() == 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size"), [(1, 4096), (256, 4096), (8, 1024), (3, 16384)])
def test_a_card_normalises_rows_of_real_sizes(rows: int, size: int, dtype: torch.dtype) -> None:
    cuda.activate(torch.device("cuda"))
    hidden, residual = (torch.randn(rows, size, device="cuda", dtype=dtype) for _ in range(2))
    weight = torch.randn(size, device="cuda", dtype=dtype)
    expected, total = add_rms_norm.reference(hidden, residual.clone(), weight, EPS)
    found, found_total = add_rms_norm_cuda(hidden, residual, weight, EPS)
    assert torch.equal(found_total, total)
    close(found, expected)
    close(rms_norm_cuda(hidden, weight, EPS), rms_norm.reference(hidden, weight, EPS))
