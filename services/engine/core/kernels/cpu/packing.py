"""Weights as the linear kernels read them: tiles of 16 outputs, in bf16, 8 or 4 bits.

src/linear.h describes the layouts. A matrix of a checkpoint that is quantised in groups of 32
(`GroupedWeight`) keeps its own values; any other is rounded to the format that is asked for.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

GROUP_INPUTS = 32
TILE_OUTPUTS = 16
_ALIGNMENT = 64


class WeightFormat(IntEnum):
    """How a packed matrix stores its weights, `enum class WeightFormat` of src/linear.h."""

    BF16 = 0
    Q8 = 1
    Q4 = 2


class LinearWeights(ctypes.Structure):
    """`struct LinearWeights` of src/linear.h."""

    _fields_ = (
        ("format", ctypes.c_int32),
        ("inputs", ctypes.c_int32),
        ("outputs", ctypes.c_int32),
        ("data", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("minima", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
    )


@dataclass(frozen=True, slots=True)
class GroupedWeight:
    """A matrix quantised in groups of 32 inputs: weight = scale * level + minimum.

    levels: uint8 [outputs, inputs], below 2**bits; scales, minima: float16 [outputs, inputs / 32].
    Without minima the levels, of eight bits then, are centred: weight = scale * (level - 128).
    """

    levels: Tensor
    scales: Tensor
    minima: Tensor | None
    bits: int  # 4 or 8

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        return self.levels.shape[0], self.levels.shape[1]

    def dequantize(self) -> Tensor:
        """Return the values as float32 [outputs, inputs]."""
        groups = self.levels.view(self.shape[0], -1, GROUP_INPUTS).float()
        scales = self.scales.float().unsqueeze(-1)
        if self.minima is None:
            values = (groups - 128) * scales
        else:
            values = groups * scales + self.minima.float().unsqueeze(-1)
        return values.view(self.shape)

    def rows(self, order: Tensor) -> GroupedWeight:
        """Return the outputs in another order."""
        minima = None if self.minima is None else self.minima[order]
        return GroupedWeight(self.levels[order], self.scales[order], minima, self.bits)


def quantize_8(weight: Tensor) -> GroupedWeight:
    """Round to 8 bits, symmetric around 0, as GGUF's Q8_0 does. weight: [outputs, inputs]."""
    groups = weight.float().view(weight.shape[0], -1, GROUP_INPUTS)
    scales = (groups.abs().amax(-1) / 127).half()
    levels = torch.round(groups / _divisor(scales)).clamp_(-127, 127) + 128
    return GroupedWeight(levels.to(torch.uint8).view(weight.shape), scales, None, bits=8)


def quantize_4(weight: Tensor) -> GroupedWeight:
    """Round to 4 bits between each group's extremes, as GGUF's Q4_1 does.

    Each group's scale and minimum are then fitted to the levels by least squares, which takes off
    some of the error. weight: [outputs, inputs].
    """
    groups = weight.float().view(weight.shape[0], -1, GROUP_INPUTS)
    minima, peaks = groups.amin(-1), groups.amax(-1)
    scales = (peaks - minima) / 15
    levels = torch.zeros_like(groups)
    for _ in range(2):
        scales, minima = scales.half(), minima.half()
        offsets = groups - minima.float().unsqueeze(-1)
        levels = torch.round(offsets / _divisor(scales)).clamp_(0, 15)
        scales, minima = _least_squares(levels, groups, scales.float(), minima.float())
    return GroupedWeight(
        levels.to(torch.uint8).view(weight.shape), scales.half(), minima.half(), bits=4
    )


def concatenate(parts: list[GroupedWeight]) -> GroupedWeight | None:
    """Return the parts' outputs one after the other; None where their formats differ."""
    first = parts[0]
    if any(p.bits != first.bits or (p.minima is None) != (first.minima is None) for p in parts):
        return None
    minima = [p.minima for p in parts if p.minima is not None]
    return GroupedWeight(
        torch.cat([p.levels for p in parts]),
        torch.cat([p.scales for p in parts]),
        torch.cat(minima) if minima else None,
        first.bits,
    )


class PackedLinear:
    """A matrix packed for the kernels, and the memory that `struct` points to."""

    def __init__(
        self,
        weight_format: WeightFormat,
        shape: tuple[int, int],
        data: npt.NDArray[np.uint8],
        scales: npt.NDArray[np.uint16] | None = None,
        minima: npt.NDArray[np.uint16] | None = None,
        bias: Tensor | None = None,
    ) -> None:
        self.weight_format = weight_format
        self.outputs, self.inputs = shape
        self._memory = [data, scales, minima, _padded_bias(bias, shape[0])]
        addresses = [None if part is None else part.ctypes.data for part in self._memory]
        self.struct = LinearWeights(int(weight_format), shape[1], shape[0], *addresses)

    @property
    def num_bytes(self) -> int:
        """Bytes that one pass over the matrix reads."""
        return sum(part.nbytes for part in self._memory if part is not None)


def pack_bf16(weight: Tensor, bias: Tensor | None = None, *, gated: bool = False) -> PackedLinear:
    """Pack [outputs, inputs] of any floating-point type, rounded to bf16.

    gated: the first half of the outputs are gates and the second half the values they gate; their
    tiles alternate. Raises ValueError for sizes that the kernels do not serve.
    """
    tiles = _tiles(weight.to(torch.bfloat16).view(torch.int16), gated)  # [tiles, 16, inputs]
    packed = tiles.view(len(tiles), TILE_OUTPUTS, -1, 2).transpose(1, 2)
    data = _aligned(packed.contiguous().view(torch.uint8))
    shape = (weight.shape[0], weight.shape[1])
    return PackedLinear(WeightFormat.BF16, shape, data, bias=_gated_bias(bias, gated))


def pack_grouped(
    weight: GroupedWeight, bias: Tensor | None = None, *, gated: bool = False
) -> PackedLinear:
    """Pack a quantised matrix as it is; `gated` as for `pack_bf16`."""
    if weight.bits == 4 and weight.minima is None:
        raise ValueError("levels of 4 bits come with minima")
    levels = _tiles(weight.levels, gated)
    # [tiles, groups, 8 steps, 16 outputs, 4 inputs]
    stepped = levels.view(len(levels), TILE_OUTPUTS, -1, 8, 4).permute(0, 2, 3, 1, 4)
    if weight.bits == 4:
        stepped = stepped[:, :, :4] | (stepped[:, :, 4:] << 4)
    return PackedLinear(
        WeightFormat.Q4 if weight.bits == 4 else WeightFormat.Q8,
        weight.shape,
        _aligned(stepped.contiguous()),
        _tiled_halves(weight.scales, gated),
        None if weight.minima is None else _tiled_halves(weight.minima, gated),
        _gated_bias(bias, gated),
    )


def _tiles(rows: Tensor, gated: bool) -> Tensor:
    """[outputs, n] -> [tiles, 16, n], padded with zeros; gates and values in alternating tiles."""
    outputs, inputs = rows.shape
    if inputs % GROUP_INPUTS and rows.dtype != torch.float16:
        raise ValueError(f"the kernels take inputs in groups of {GROUP_INPUTS}, not {inputs}")
    if gated:
        if outputs % (2 * TILE_OUTPUTS):
            raise ValueError(f"gates come in tiles of {TILE_OUTPUTS}, not {outputs // 2} of them")
        halves = rows.view(2, -1, TILE_OUTPUTS, inputs)
        return halves.transpose(0, 1).reshape(-1, TILE_OUTPUTS, inputs)
    padding = -outputs % TILE_OUTPUTS
    if padding:
        rows = torch.cat((rows, rows.new_zeros(padding, inputs)))
    return rows.reshape(-1, TILE_OUTPUTS, inputs)


def _tiled_halves(values: Tensor, gated: bool) -> npt.NDArray[np.uint16]:
    tiled = _tiles(values.half(), gated).transpose(1, 2).contiguous()
    return _aligned(tiled.view(torch.uint8)).view(np.uint16)


def _gated_bias(bias: Tensor | None, gated: bool) -> Tensor | None:
    if bias is None or not gated:
        return bias
    return bias.view(2, -1, TILE_OUTPUTS).transpose(0, 1).reshape(-1)


def _padded_bias(bias: Tensor | None, outputs: int) -> npt.NDArray[np.float32] | None:
    if bias is None:
        return None
    padded = np.zeros(-(-outputs // TILE_OUTPUTS) * TILE_OUTPUTS, np.float32)
    padded[:outputs] = bias.float().numpy()
    return padded


def _aligned(packed: Tensor) -> npt.NDArray[np.uint8]:
    """A copy of the bytes that begins on a cache line."""
    flat = packed.view(-1).numpy()
    memory = np.empty(flat.nbytes + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    aligned = memory[start : start + flat.nbytes]
    aligned[:] = flat
    return aligned


def _divisor(scales: Tensor) -> Tensor:
    """The scales, and 1 for those of groups that are all one value."""
    whole = scales.float()
    return torch.where(whole == 0, 1.0, whole).unsqueeze(-1)


def _least_squares(
    levels: Tensor, groups: Tensor, scales: Tensor, minima: Tensor
) -> tuple[Tensor, Tensor]:
    """The scale and minimum of each group that fit its levels best."""
    level_mean, mean = levels.mean(-1), groups.mean(-1)
    centred = levels - level_mean.unsqueeze(-1)
    variance = centred.square().sum(-1)
    slope = (centred * groups).sum(-1) / torch.where(variance == 0, 1.0, variance)
    usable = (variance > 0) & (slope > 0)
    fitted = torch.where(usable, slope, scales)
    return fitted, torch.where(usable, mean - fitted * level_mean, minima)
