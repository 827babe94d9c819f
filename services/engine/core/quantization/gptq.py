"""Rounding that makes up for its own errors.

Frantar et al., arXiv:2210.17323 (GPTQ): inputs are rounded one after the other, and what rounding
one takes from the outputs is given back by the inputs that are still to come, as far as the two
were alike on calibration text. Inputs that carry most come first; the grids are fitted beforehand,
so that groups stay together whatever the order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from services.engine.core.kernels.cpu.packing import GROUP_INPUTS
from services.engine.core.quantization.grid import Rounded, fit_grid

_BLOCK_INPUTS = 128
# Added to the diagonal of the products of inputs, of its mean; more where that is not enough.
_DAMPINGS = (0.01, 0.1, 1.0)


def round_with_compensation(weight: Tensor, bits: int, products: Tensor) -> Rounded:
    """Round a matrix, float32 [outputs, inputs].

    products: of the inputs on calibration text with each other, X^T X, float32 [inputs, inputs].
    """
    grid = fit_grid(weight, bits, products.diagonal())
    order = products.diagonal().argsort(descending=True)
    factor = _inverse_factor(products[order][:, order])
    # [inputs, outputs], in order: the weights of an input lie together.
    rest = weight.T[order].contiguous()
    scales = grid.scales.T[order // GROUP_INPUTS].contiguous()
    levels = torch.empty_like(rest)
    most = 2**bits - 1
    for start in range(0, len(rest), _BLOCK_INPUTS):
        end = min(start + _BLOCK_INPUTS, len(rest))
        block, own = rest[start:end], factor[start:end, start:end]
        errors = torch.empty_like(block)
        for at in range(end - start):
            scale = scales[start + at]
            level = torch.round(block[at] / scale).add_(grid.middle).clamp_(0, most)
            levels[start + at] = level
            errors[at] = (block[at] - (level - grid.middle) * scale) / own[at, at]
            if at + 1 < end - start:
                block[at + 1 :].addr_(own[at, at + 1 :], errors[at], alpha=-1)
        rest[end:] -= factor[start:end, end:].T @ errors
    back = torch.empty_like(levels)
    back[order] = levels
    return Rounded(back.T.contiguous().to(torch.uint8), grid)


def _inverse_factor(products: Tensor) -> Tensor:
    """The upper triangular factor of the inverse of the damped products."""
    mean = products.diagonal().mean().clamp(min=1e-12)
    for damping in _DAMPINGS:
        damped = products + torch.eye(len(products)) * (damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if failed:
            continue
        upper: Tensor
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed:
            return upper
    # Nothing is known of how inputs go together: each is rounded by itself.
    return torch.eye(len(products))
