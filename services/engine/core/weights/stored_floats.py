"""A projection of eight-bit floats with scales: for all of it, for each output, or for blocks.

Micikevicius et al., arXiv:2209.05433 (the format); DeepSeek-AI, arXiv:2412.19437 (blocks).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from services.engine.core.kernels import ScaledMatrix
from services.engine.core.kernels.cpu.packing import GroupedWeight
from services.engine.core.weights.stored_linear import rounded, rounded_outline

# Without its sign, the byte of float8_e4m3fn that is no number.
_NOT_A_NUMBER = 0x7F


@dataclass(frozen=True, slots=True)
class StoredFloats:
    """weight[o, i] = scales[o // block[0], i // block[1]] * elements[o, i].

    elements: float8_e4m3fn [outputs, inputs]; scales: float [outputs / block[0], inputs /
    block[1]], rounded up: the last block of a row or a column may be smaller. is_weight_only:
    whether activations stay as they are beside it.
    """

    elements: Tensor
    scales: Tensor
    block: tuple[int, int]
    is_weight_only: bool

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        return self.elements.shape[0], self.elements.shape[1]

    def check(self) -> None:
        """Raise ValueError for numbers that no model has."""
        if not bool(self.scales.float().isfinite().all()):
            raise ValueError("has scales that are no finite numbers")
        if self.elements.is_meta:
            return
        magnitudes = self.elements.view(torch.uint8) & _NOT_A_NUMBER
        if bool((magnitudes == _NOT_A_NUMBER).any()):
            raise ValueError("has elements that are no numbers")

    def dequantize(self, rows: slice = slice(None)) -> Tensor:
        """Return the values of some outputs as float32 [outputs, inputs]."""
        outputs, inputs = self.shape
        scales = self.scales.float()[torch.arange(outputs)[rows] // self.block[0]]
        if scales.shape[1] > 1:
            scales = scales.repeat_interleave(self.block[1], 1)[:, :inputs]
        return self.elements[rows].float() * scales

    def grouped(self) -> GroupedWeight:
        """Return the matrix in groups of 32, rounded to 8 bits."""
        return rounded(self.dequantize, self.shape)

    def outline(self) -> GroupedWeight:
        """Return what `grouped` would, where elements are on the meta device."""
        return rounded_outline(self.shape)

    def scaled(self) -> ScaledMatrix | None:
        """Return the matrix as it is, where outputs have one scale each and activations are rounded
        as well; else None."""
        if self.is_weight_only or self.scales.shape[1] > 1:
            return None
        outputs = torch.arange(self.shape[0]) // self.block[0]
        return ScaledMatrix(self.elements, self.scales[outputs, 0].float())
