"""Matrices of eight and four bits as a device keeps them.

`GroupedMatrix` is for activations that stay in 16 bits (weight-only quantisation): levels in groups
of inputs, each with a scale and, where levels do not lie around the middle of their range, a
minimum. `ScaledMatrix` is for activations that are rounded to the same format, so that the matrix
units multiply both as they are: a scale for each output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from services.engine.core.kernels.quantized_rows import LARGEST

if TYPE_CHECKING:
    from services.engine.core.kernels.cpu.packing import GroupedWeight

GROUP_INPUTS = 32  # of a `GroupedWeight`
# Groups that a scale may serve, largest first: scales of 16 bits cost 1/8, 1/4 and 1/2 of a bit.
GROUP_SIZES = (128, 64, 32)
_CHUNK_ELEMENTS = 1 << 24  # rounded at a time, in float32


@dataclass(frozen=True, slots=True)
class GroupedMatrix:
    """weight[o, i] = scales[o, g] * level[o, i] + minima[o, g], where g is the group of input i.

    Without minima, levels are centred: weight = scale * (level - 2**(bits - 1)).

    Attributes:
        levels: of 8 bits: uint8 [..., outputs, inputs]. Of 4: uint8 [..., outputs, inputs / 2]; 16
            bytes hold 32 inputs that follow one another, byte j input j in its low half and input
            16 + j in its high half. So a thread that reads 16 bytes has 32 inputs of one group.
        scales, minima: float16 [..., outputs, inputs / group_size].
        bits: 4 or 8.
    """

    levels: Tensor
    scales: Tensor
    minima: Tensor | None
    bits: int

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., outputs, inputs]."""
        return (*self.levels.shape[:-1], self.levels.shape[-1] * 8 // self.bits)

    @property
    def group_size(self) -> int:
        """How many inputs share a scale: one of GROUP_SIZES."""
        return self.shape[-1] // self.scales.shape[-1]

    @property
    def nbytes(self) -> int:
        """Bytes of all parts, as a step reads them."""
        minima = 0 if self.minima is None else self.minima.nbytes
        return self.levels.nbytes + self.scales.nbytes + minima

    def rows(self, rows: slice | Tensor | int) -> GroupedMatrix:
        """Some outputs of a matrix, or some matrices of a stack."""
        minima = None if self.minima is None else self.minima[rows]
        return replace(self, levels=self.levels[rows], scales=self.scales[rows], minima=minima)

    def dequantize(self) -> Tensor:
        """Return the values as float32 [..., outputs, inputs]."""
        levels = self.levels
        if self.bits == 4:
            halves = _split(levels, GROUP_INPUTS // 2).unsqueeze(-2)
            levels = torch.cat((halves & 0xF, halves >> 4), dim=-2).flatten(-3)
        groups = _split(levels, self.group_size).float()
        scales = self.scales.float().unsqueeze(-1)
        if self.minima is None:
            values: Tensor = (groups - (1 << self.bits - 1)) * scales
        else:
            values = groups * scales + self.minima.float().unsqueeze(-1)
        return values.flatten(-2)

    @staticmethod
    def of(weight: GroupedWeight) -> GroupedMatrix:
        """Lay out a matrix of a checkpoint, on its device: the same values in no more bytes.

        Of an outline, whose levels are on the meta device, the result is one too.
        """
        scales, minima = weight.scales, weight.minima
        # GGUF's Q4_0, GPTQ's symmetric kind: what their minima say is known.
        if (
            minima is not None
            and not minima.is_meta
            and torch.equal(minima, scales * -(1 << weight.bits - 1))
        ):
            minima = None
        times = _repeats(scales, minima)
        if times > 1:
            scales = scales[..., ::times].contiguous()
            minima = None if minima is None else minima[..., ::times].contiguous()
        levels = weight.levels
        if weight.bits == 4:
            halves = _split(_split(levels, GROUP_INPUTS), GROUP_INPUTS // 2)
            levels = (halves[..., 0, :] | halves[..., 1, :] << 4).flatten(-2)
        return GroupedMatrix(levels, scales, minima, weight.bits)

    @staticmethod
    def stack(matrices: Sequence[GroupedMatrix]) -> GroupedMatrix | None:
        """Matrices of the same shape as one, [matrices, outputs, inputs], with the same values;
        None where they differ in their bits."""
        first = matrices[0]
        if any(each.bits != first.bits for each in matrices):
            return None
        if len({each.group_size for each in matrices}) > 1:
            least = min(each.group_size for each in matrices)
            matrices = [each._regrouped(least) for each in matrices]
        minima = [each.minima for each in matrices if each.minima is not None]
        if minima and len(minima) < len(matrices):
            centre = 1 << first.bits - 1
            minima = [
                each.scales * -centre if each.minima is None else each.minima for each in matrices
            ]
        return GroupedMatrix(
            torch.stack([each.levels for each in matrices]),
            torch.stack([each.scales for each in matrices]),
            torch.stack(minima) if minima else None,
            first.bits,
        )

    def _regrouped(self, size: int) -> GroupedMatrix:
        times = self.group_size // size
        minima = None if self.minima is None else self.minima.repeat_interleave(times, -1)
        return replace(self, scales=self.scales.repeat_interleave(times, -1), minima=minima)


@dataclass(frozen=True, slots=True)
class ScaledMatrix:
    """weight[o, i] = scales[o] * element[o, i].

    Attributes:
        elements: int8 or float8_e4m3fn [..., outputs, inputs].
        scales: float32 [..., outputs].
    """

    elements: Tensor
    scales: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., outputs, inputs]."""
        return tuple(self.elements.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all parts, as a step reads them."""
        return self.elements.nbytes + self.scales.nbytes

    def rows(self, rows: slice | Tensor) -> ScaledMatrix:
        """Some outputs of a matrix, or some matrices of a stack."""
        return ScaledMatrix(self.elements[rows], self.scales[rows])

    def dequantize(self) -> Tensor:
        """Return the values as float32 [..., outputs, inputs]."""
        return self.elements.float() * self.scales.unsqueeze(-1)

    @staticmethod
    def rounded(weight: Tensor, dtype: torch.dtype) -> ScaledMatrix:
        """Round [outputs, inputs] to int8 or float8_e4m3fn, each row by its largest element."""
        elements = torch.empty(weight.shape, dtype=dtype, device=weight.device)
        scales = torch.empty(weight.shape[0], device=weight.device)
        step = max(_CHUNK_ELEMENTS // weight.shape[1], 1)
        for start in range(0, weight.shape[0], step):
            rows = weight[start : start + step].float()
            own = rows.abs().amax(-1) / LARGEST[dtype]
            scaled = rows / torch.where(own > 0, own, 1.0).unsqueeze(-1)
            elements[start : start + step] = scaled.round() if dtype == torch.int8 else scaled
            scales[start : start + step] = own
        return ScaledMatrix(elements, scales)

    @staticmethod
    def of(weight: GroupedWeight) -> ScaledMatrix | None:
        """The same values in int8, where each output has one scale and no minimum; else None."""
        first = weight.scales[:, :1]
        if weight.bits != 8 or weight.minima is not None or not (weight.scales == first).all():
            return None
        return ScaledMatrix((weight.levels ^ 0x80).view(torch.int8), first[:, 0].float())


# A matrix as a layer keeps it; a tensor is one in the precision of the activations.
Matrix: TypeAlias = Tensor | GroupedMatrix | ScaledMatrix


def _repeats(scales: Tensor, minima: Tensor | None) -> int:
    """How many groups of 32 that follow one another share their scales everywhere, as far as these
    are known."""
    if scales.is_meta:
        return 1
    for size in GROUP_SIZES:
        times = size // GROUP_INPUTS
        if scales.shape[-1] % times == 0 and all(
            bool((_split(part, times) == part[..., ::times, None]).all())
            for part in (scales, minima)
            if part is not None
        ):
            return times
    return 1  # not even with themselves: some are no numbers


def _split(values: Tensor, size: int) -> Tensor:
    """The last dimension in pieces: [..., n * size] -> [..., n, size]."""
    return values.reshape(*values.shape[:-1], -1, size)
