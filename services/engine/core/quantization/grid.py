"""Which numbers the weights of a group may be rounded to.

Groups are of 32 inputs, as the CPU kernels have them. Scales are bf16 numbers, which a half holds
as well: so an engine, and any library that computes in bf16 or wider, has the very same scales.
The middle level is 0: transformers 5 with compressed-tensors 0.20 loads no other zero points.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from services.engine.core.kernels.cpu.packing import GROUP_INPUTS

# Of what reaches a group's extremes. A narrower grid cuts these and has all others nearer.
_SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
# The smallest scale that is the same as bf16 and as a half.
_LEAST_SCALE = 2.0**-16


@dataclass(frozen=True, slots=True)
class Grid:
    """weight[o, i] = scales[o, g] * (level - middle), with level from 0 to 2**bits - 1.

    scales: float32 [outputs, groups], none of them 0. There is a level more below the middle than
    above it: a scale below 0 has it on the other side.
    """

    scales: Tensor
    bits: int

    @property
    def middle(self) -> int:
        """The level that stands for 0."""
        return 1 << (self.bits - 1)

    def levels(self, weight: Tensor) -> Tensor:
        """The nearest levels, float32 [outputs, inputs]."""
        groups = weight.view(len(weight), -1, GROUP_INPUTS)
        levels = torch.round(groups / self.scales.unsqueeze(-1)) + self.middle
        return levels.clamp_(0, 2**self.bits - 1).view(weight.shape)

    def values(self, levels: Tensor) -> Tensor:
        """What levels stand for, float32 [outputs, inputs]."""
        groups = levels.view(len(levels), -1, GROUP_INPUTS) - self.middle
        return (groups * self.scales.unsqueeze(-1)).view(levels.shape)


@dataclass(frozen=True, slots=True)
class Rounded:
    """A matrix that has been rounded; levels: uint8 [outputs, inputs]."""

    levels: Tensor
    grid: Grid

    def dequantize(self) -> Tensor:
        """The values as float32 [outputs, inputs]."""
        return self.grid.values(self.levels.float())


def fit_grid(weight: Tensor, bits: int, importance: Tensor | None = None) -> Grid:
    """Return the grid for a matrix, float32 [outputs, inputs] with inputs in whole groups.

    8 bits reach to a group's largest weight. 4 bits do, or not quite where that makes the sum of
    squared errors smaller, each weighed by its input's `importance` [inputs].
    """
    groups = weight.view(len(weight), -1, GROUP_INPUTS)
    if bits == 8:
        return Grid(as_stored(groups.abs().amax(-1) / 127), bits)
    most, least = groups.amax(-1), groups.amin(-1)
    # The further level below the middle, or, turned round, above it.
    upright, turned = torch.maximum(most / 7, least / -8), torch.minimum(least / 7, most / -8)
    weigh = torch.ones(weight.shape[1]) if importance is None else importance
    weigh = weigh.view(-1, GROUP_INPUTS)
    best, least_error = Grid(upright, bits), torch.full_like(upright, torch.inf)
    for widest in (upright, turned):
        for shrink in _SHRINKS:
            grid = Grid(as_stored(widest * shrink), bits)
            off = (grid.values(grid.levels(weight)) - weight).view(groups.shape)
            error = (off.square_() * weigh).sum(-1)
            better = error < least_error
            least_error = torch.where(better, error, least_error)
            best = Grid(torch.where(better, grid.scales, best.scales), bits)
    return best


def round_to_nearest(weight: Tensor, bits: int) -> Rounded:
    """Round each weight by itself."""
    grid = fit_grid(weight, bits)
    return Rounded(grid.levels(weight).to(torch.uint8), grid)


def as_stored(scales: Tensor) -> Tensor:
    """The nearest scales that files hold."""
    least = torch.where(scales < 0, -_LEAST_SCALE, _LEAST_SCALE)
    stored = torch.where(scales.abs() < _LEAST_SCALE, least, scales).to(torch.bfloat16).float()
    return torch.where(scales == 0, 1.0, stored)
