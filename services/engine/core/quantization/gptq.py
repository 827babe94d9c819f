"""Rounding that makes up for its own errors.

Frantar et al., arXiv:2210.17323 (GPTQ): inputs are rounded one after the other, and what rounding
one takes from the outputs is given back by the inputs that are still to come, as far as the two
were alike on calibration text. Inputs that carry most come first; the grids are fitted beforehand,
so that groups stay together whatever the order. Then each input is moved to the level that is best
with all others as they are (Behdin et al., arXiv:2309.01885, QuantEase), and scales are fitted
anew to the levels, which can only make errors smaller.

Errors are of outputs on calibration text: of a row e of errors, e P e^T, with the products P of
inputs with each other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from services.engine.core.kernels.cpu.packing import GROUP_INPUTS
from services.engine.core.quantization.grid import (
    Grid,
    Rounded,
    as_stored,
    fit_grid,
    round_to_nearest,
)

_BLOCK_INPUTS = 128
# Added to the diagonal of the products of inputs, of its mean; more where that is not enough.
_DAMPINGS = (0.01, 0.1, 1.0)
_SWEEPS = 1
# Of normal equations for scales, held at a time.
_CHUNK_ELEMENTS = 1 << 22


def round_with_compensation(weight: Tensor, bits: int, products: Tensor) -> Rounded:
    """Round a matrix, float32 [outputs, inputs]: no row has a larger error than rounded to nearest.

    products: of the inputs on calibration text with each other, X^T X, float32 [inputs, inputs].
    """
    grid = fit_grid(weight, bits, products.diagonal())
    order = products.diagonal().argsort(descending=True)
    damped, factor = _damped_and_factor(products[order][:, order])
    damped_as_stored = torch.empty_like(damped)
    damped_as_stored[order[:, None], order] = damped
    levels = _compensated(weight, grid, order, factor)
    for _ in range(_SWEEPS):
        grid = _refitted(weight, levels, grid, damped_as_stored)
        levels = _descended(weight, levels, grid, order, damped)
    return _better_rows(
        weight, products, Rounded(levels.to(torch.uint8), grid), round_to_nearest(weight, bits)
    )


def row_errors(weight: Tensor, values: Tensor, products: Tensor) -> Tensor:
    """The squared errors of each output, summed up over calibration text, [outputs]."""
    off = weight - values
    return ((off @ products) * off).sum(-1)


def _better_rows(weight: Tensor, products: Tensor, first: Rounded, second: Rounded) -> Rounded:
    """The rows of the first, but where those of the second have less error."""
    errors = [row_errors(weight, each.dequantize(), products) for each in (first, second)]
    worse = (errors[0] > errors[1])[:, None]
    scales = torch.where(worse, second.grid.scales, first.grid.scales)
    levels = torch.where(worse, second.levels, first.levels)
    return Rounded(levels, Grid(scales, first.grid.bits))


def _compensated(weight: Tensor, grid: Grid, order: Tensor, factor: Tensor) -> Tensor:
    """GPTQ's levels. factor: of `_damped_and_factor`, in this order."""
    # [inputs, outputs], in order: the weights of an input lie together.
    rest = weight.T[order].contiguous()
    scales = grid.scales.T[order // GROUP_INPUTS].contiguous()
    levels = torch.empty_like(rest)
    for start in range(0, len(rest), _BLOCK_INPUTS):
        end = min(start + _BLOCK_INPUTS, len(rest))
        block, own = rest[start:end], factor[start:end, start:end]
        errors = torch.empty_like(block)
        for at in range(end - start):
            scale = scales[start + at]
            level = _nearest(block[at] / scale, grid)
            levels[start + at] = level
            errors[at] = (block[at] - (level - grid.middle) * scale) / own[at, at]
            if at + 1 < end - start:
                block[at + 1 :].addr_(own[at, at + 1 :], errors[at], alpha=-1)
        rest[end:] -= factor[start:end, end:].T @ errors
    return _from_order(levels, order)


def _descended(
    weight: Tensor, levels: Tensor, grid: Grid, order: Tensor, products: Tensor
) -> Tensor:
    """Levels after each has moved to where it is best with the others; products: in order."""
    scales = grid.scales.T[order // GROUP_INPUTS].contiguous()
    centred = (levels - grid.middle).T[order].contiguous()
    # What every output's error would change by, for each input: products x error.
    off = weight.T[order] - centred * scales
    slopes = products @ off
    for start in range(0, len(off), _BLOCK_INPUTS):
        end = min(start + _BLOCK_INPUTS, len(off))
        block, own = slopes[start:end], products[start:end, start:end]
        moved = torch.empty_like(block)
        for at in range(end - start):
            scale, now = scales[start + at], centred[start + at]
            best = torch.round(now + block[at] / (own[at, at] * scale))
            best.clamp_(-grid.middle, grid.middle - 1)
            moved[at] = (best - now) * scale
            centred[start + at] = best
            if at + 1 < end - start:
                block[at + 1 :].addr_(own[at, at + 1 :], moved[at], alpha=-1)
        slopes[end:] -= products[start:end, end:].T @ moved
    return _from_order(centred, order) + grid.middle


def _refitted(weight: Tensor, levels: Tensor, grid: Grid, products: Tensor) -> Grid:
    """The scales that fit each row's levels best, where they are better as they are stored."""
    groups = weight.shape[1] // GROUP_INPUTS
    fitted = torch.empty_like(grid.scales)
    step = max(_CHUNK_ELEMENTS // (groups * groups), 1)
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        centred = levels[rows] - grid.middle
        wanted = ((weight[rows] @ products) * centred).view(len(centred), groups, -1).sum(-1)
        normal = torch.empty(len(centred), groups, groups)
        for group in range(groups):
            own = slice(group * GROUP_INPUTS, (group + 1) * GROUP_INPUTS)
            shared = (centred[:, own] @ products[own]) * centred
            normal[:, group] = shared.view(len(centred), groups, -1).sum(-1)
        diagonal = normal.diagonal(dim1=1, dim2=2)
        # A group whose levels are all the middle says nothing of its scale.
        diagonal += torch.where(diagonal == 0, 1.0, 1e-6 * diagonal)
        solved, failed = torch.linalg.solve_ex(normal, wanted.unsqueeze(-1))
        usable = (failed == 0)[:, None] & solved.squeeze(-1).isfinite()
        fitted[rows] = torch.where(usable, solved.squeeze(-1), grid.scales[rows])
    other = Grid(as_stored(torch.where(fitted == 0, grid.scales, fitted)), grid.bits)
    better = row_errors(weight, other.values(levels), products) < row_errors(
        weight, grid.values(levels), products
    )
    return Grid(torch.where(better[:, None], other.scales, grid.scales), grid.bits)


def _nearest(places: Tensor, grid: Grid) -> Tensor:
    return torch.round(places).add_(grid.middle).clamp_(0, 2**grid.bits - 1)


def _from_order(rows: Tensor, order: Tensor) -> Tensor:
    back = torch.empty_like(rows)
    back[order] = rows
    return back.T.contiguous()


def _damped_and_factor(products: Tensor) -> tuple[Tensor, Tensor]:
    """The products, damped, and the upper triangular factor of their inverse."""
    mean = products.diagonal().mean().clamp(min=1e-12)
    identity = torch.eye(len(products))
    for damping in _DAMPINGS:
        damped = products + identity * (damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if failed:
            continue
        upper: Tensor
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed:
            return damped, upper
    # Nothing is known of how inputs go together: each is rounded by itself.
    return identity * mean, identity
