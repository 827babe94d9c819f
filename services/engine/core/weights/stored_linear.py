"""A quantised projection as GPTQ, AWQ and compressed-tensors store it, whatever their files do.

Frantar et al., arXiv:2210.17323 (GPTQ); Lin et al., arXiv:2306.00978 (AWQ).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from services.engine.core.kernels.cpu.packing import GROUP_INPUTS, GroupedWeight, quantize_8

# Rounded at a time: as float32 a whole matrix takes four times what is kept of it.
_CHUNK_ELEMENTS = 1 << 20
# How far a scale may be off as a half, against the largest: what rounding a weight to bf16 costs.
_HALF_TOLERANCE = 2.0**-9


@dataclass(frozen=True, slots=True)
class StoredLinear:
    """weight[o, i] = scales[o, g] * (levels[o, i] - zeros[o, g]), where g is the group of input i.

    levels: uint8 [outputs, inputs], below 2**bits; scales: float [outputs, groups]; zeros: int16
    [outputs, groups]; group_of: [inputs], None where groups of one size follow one another.
    """

    levels: Tensor
    scales: Tensor
    zeros: Tensor
    bits: int
    group_of: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        return self.levels.shape[0], self.levels.shape[1]

    def check(self) -> None:
        """Raise ValueError for scales that no model has."""
        if not bool(self.scales.isfinite().all()):
            raise ValueError("has scales that are no finite numbers")

    def dequantize(self, rows: slice = slice(None)) -> Tensor:
        """Return the values of some outputs as float32 [outputs, inputs]."""
        levels, scales, zeros = self.levels[rows], self.scales[rows].float(), self.zeros[rows]
        if self.group_of is not None:
            return (levels - zeros[:, self.group_of]) * scales[:, self.group_of]
        groups = levels.view(levels.shape[0], scales.shape[1], -1)
        return ((groups - zeros.unsqueeze(-1)) * scales.unsqueeze(-1)).view(levels.shape)

    def grouped(self) -> GroupedWeight:
        """Return the matrix in groups of 32 with its own levels, or rounded to 8 bits.

        Levels stay where groups are made of whole groups of 32, and scales fit into halves.
        """
        own = self._own_groups()
        return own if own is not None else rounded(self.dequantize, self.shape)

    def outline(self) -> GroupedWeight:
        """Return what `grouped` would, where levels are on the meta device."""
        own = self._own_groups()
        return own if own is not None else rounded_outline(self.shape)

    def _own_groups(self) -> GroupedWeight | None:
        inputs, groups = self.shape[1], self.scales.shape[1]
        if self.group_of is not None or inputs % GROUP_INPUTS or inputs // groups % GROUP_INPUTS:
            return None
        scales = self.scales.half()
        off = (scales.float() - self.scales.float()).abs().amax()
        if not off <= _HALF_TOLERANCE * self.scales.float().abs().amax():
            return None
        repeats = inputs // groups // GROUP_INPUTS
        if self.bits == 8 and (self.zeros == 128).all():
            return GroupedWeight(self.levels, _repeated(scales, repeats), None, bits=8)
        minima = (self.scales.float() * -self.zeros).half()
        if not minima.isfinite().all():
            return None
        return GroupedWeight(
            self.levels, _repeated(scales, repeats), _repeated(minima, repeats), self.bits
        )


def rounded(dequantize: Callable[[slice], Tensor], shape: tuple[int, int]) -> GroupedWeight:
    """Return a matrix rounded to 8 bits, some of its rows at a time.

    `dequantize` gives the values of rows as float [rows, inputs]. Raises ValueError for inputs
    that are no whole groups of 32.
    """
    outputs, inputs = shape
    levels = torch.empty(outputs, inputs, dtype=torch.uint8)
    scales = torch.empty(outputs, inputs // GROUP_INPUTS, dtype=torch.float16)
    step = max(_CHUNK_ELEMENTS // inputs, 1)
    for start in range(0, outputs, step):
        rows = slice(start, start + step)
        part = quantize_8(dequantize(rows))
        levels[rows], scales[rows] = part.levels, part.scales
    return GroupedWeight(levels, scales, None, bits=8, is_rounded=True)


def rounded_outline(shape: tuple[int, int]) -> GroupedWeight:
    """Return what `rounded` would, without its numbers: levels on the meta device, made-up
    scales."""
    return GroupedWeight(
        torch.empty(shape, dtype=torch.uint8, device="meta"), no_scales(shape), None, bits=8
    )


def no_scales(shape: tuple[int, int]) -> Tensor:
    """Numbers in place of the scales of a matrix, which take no memory; no two groups beside each
    other have the same."""
    ones_and_twos = torch.arange(shape[1] // GROUP_INPUTS) % 2 + 1
    return ones_and_twos.half().expand(shape[0], -1)


def _repeated(values: Tensor, times: int) -> Tensor:
    return values if times == 1 else values.repeat_interleave(times, dim=1)
