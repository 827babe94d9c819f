"""What kernels in Triton share computes what it says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from triton import jit
from triton import language as tl

from services.engine.core.kernels.triton.language import dot


@jit
def _product(left, right, found, size: tl.constexpr):  # type: ignore[no-untyped-def]
    index = tl.arange(0, size)[:, None] * size + tl.arange(0, size)[None, :]
    zeros = tl.zeros((size, size), tl.float32)
    tl.store(found + index, dot(tl.load(left + index), tl.load(right + index), zeros))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_a_product_of_tiles_is_exact_but_for_the_order_of_its_sums(dtype: torch.dtype) -> None:
    left, right = (torch.randn(16, 16).to(dtype) for _ in range(2))
    found: Tensor = torch.empty(16, 16)
    _product[(1,)](left, right, found, size=16)
    torch.testing.assert_close(found, left.float() @ right.float(), atol=1e-5, rtol=1e-5)
