"""Weights as the linear kernels read them: tiles of 16 outputs, in bf16, 8 or 4 bits.

src/linear.h describes the layouts. A matrix of a checkpoint that is quantised in groups of 32
(`GroupedWeight`) keeps its own values; any other is rounded to the format that is asked for.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from services.engine.core.kernels.cpu.pages import zero_pages

GROUP_INPUTS = 32
TILE_OUTPUTS = 16
STRIP_OUTPUTS = 32  # two tiles
_ALIGNMENT = 64
_ARENA_BYTES = 32 << 20
_CHUNK_ELEMENTS = 1 << 20

Optional = TypeVar("Optional", Tensor, Tensor | None)


class WeightFormat(IntEnum):
    """How a packed matrix stores its weights, `enum class WeightFormat` of src/linear.h."""

    BF16 = 0
    Q8 = 1
    Q4 = 2


class LinearWeights(ctypes.Structure):
    """`struct LinearWeights` of src/linear.h."""

    _fields_ = (
        ("format", ctypes.c_int32),
        ("has_minima", ctypes.c_int32),
        ("inputs", ctypes.c_int32),
        ("outputs", ctypes.c_int32),
        ("data", ctypes.c_void_p),
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
    is_rounded: bool = False  # not with the levels that a file has

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

    def map(self, change: Callable[[Tensor], Tensor]) -> GroupedWeight:
        """Return what comes of the same change to the outputs of all parts."""
        minima = None if self.minima is None else change(self.minima)
        return replace(self, levels=change(self.levels), scales=change(self.scales), minima=minima)


def quantize_8(weight: Tensor) -> GroupedWeight:
    """Round to 8 bits, symmetric around 0, as GGUF's Q8_0 does. weight: [outputs, inputs].

    Raises ValueError for inputs that are no whole groups.
    """
    groups = _in_groups(weight)
    scales = (groups.abs().amax(-1) / 127).half()
    levels = torch.round(groups / _divisor(scales)).clamp_(-127, 127) + 128
    return GroupedWeight(levels.to(torch.uint8).view(weight.shape), scales, None, bits=8)


def quantize_4(weight: Tensor) -> GroupedWeight:
    """Round to 4 bits between each group's extremes, as GGUF's Q4_1 does.

    Each group's scale and minimum are then fitted to the levels by least squares, which takes off
    some of the error. weight: [outputs, inputs]. Raises ValueError as `quantize_8`.
    """
    groups = _in_groups(weight)
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
    """Return the parts' outputs one after the other, with the same values.

    Parts of different formats become eight bits with minima, which hold all others. None where a
    centred part's scales are too large for that.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    if any(p.bits != first.bits or (p.minima is None) != (first.minima is None) for p in parts):
        parts = [_with_minima(part) for part in parts]
        if not all(part.minima is not None and part.minima.isfinite().all() for part in parts):
            return None
        bits = 8
    else:
        bits = first.bits
    minima = [p.minima for p in parts if p.minima is not None]
    return GroupedWeight(
        torch.cat([p.levels for p in parts]),
        torch.cat([p.scales for p in parts]),
        torch.cat(minima) if minima else None,
        bits,
        any(p.is_rounded for p in parts),
    )


def _with_minima(weight: GroupedWeight) -> GroupedWeight:
    if weight.minima is not None:
        return weight
    return replace(weight, minima=weight.scales * -128)


class PackedLinear:
    """A matrix packed for the kernels, and the memory that `struct` points to."""

    def __init__(
        self,
        weight_format: WeightFormat,
        shape: tuple[int, int],
        data: npt.NDArray[np.uint8],
        *,
        has_minima: bool = False,
        bias: Tensor | None = None,
    ) -> None:
        self.weight_format = weight_format
        self.outputs, self.inputs = shape
        self._data = data
        self._bias = None if bias is None else _rows_of_strips(bias.float().unsqueeze(1)).numpy()
        self.struct = LinearWeights(
            int(weight_format),
            int(has_minima),
            self.inputs,
            self.outputs,
            self._data.ctypes.data,
            None if self._bias is None else self._bias.ctypes.data,
        )

    @property
    def num_bytes(self) -> int:
        """Bytes that one pass over the matrix reads."""
        return self._data.nbytes


def pack_bf16(weight: Tensor, bias: Tensor | None = None, *, gated: bool = False) -> PackedLinear:
    """Pack [outputs, inputs] of any floating-point type, rounded to bf16.

    gated: the first half of the outputs are gates and the second half the values they gate; their
    tiles alternate. Raises ValueError for sizes that the kernels do not serve.
    """
    shape = _check_sizes(weight.shape, gated)
    if gated:
        weight, bias = _alternate_tiles(weight), _alternate_tiles(bias)
    num_strips, num_pairs = -(-shape[0] // STRIP_OUTPUTS), shape[1] // 2
    memory = _arena.take(_packed_bytes(shape, WeightFormat.BF16))
    packed = torch.from_numpy(memory).view(torch.int16)
    packed = packed.view(num_strips, num_pairs, 2, TILE_OUTPUTS, 2)
    for strips, rows in _chunks(num_strips, shape[1]):
        # [strips, 2 tiles, 16 outputs, pairs of inputs, 2]
        tiles = _rows_of_strips(weight[rows].to(torch.bfloat16).view(torch.int16))
        tiles = tiles.view(-1, 2, TILE_OUTPUTS, num_pairs, 2)
        packed[strips] = tiles.permute(0, 3, 1, 2, 4)
    return PackedLinear(WeightFormat.BF16, shape, memory, bias=bias)


def pack_grouped(
    weight: GroupedWeight, bias: Tensor | None = None, *, gated: bool = False
) -> PackedLinear:
    """Pack a quantised matrix as it is; `gated` as for `pack_bf16`."""
    if weight.bits == 4 and weight.minima is None:
        raise ValueError("levels of 4 bits come with minima")
    shape = _check_sizes(weight.shape, gated)
    if gated:
        weight, bias = weight.map(_alternate_tiles), _alternate_tiles(bias)
    weight_format, has_minima = _format_of(weight), weight.minima is not None
    num_groups, num_strips = shape[1] // GROUP_INPUTS, -(-shape[0] // STRIP_OUTPUTS)
    memory = _arena.take(_packed_bytes(shape, weight_format, has_minima=has_minima))
    packed = torch.from_numpy(memory).view(num_strips, num_groups, 2, -1)
    for strips, rows in _chunks(num_strips, shape[1]):
        _pack_strips(weight, rows, packed[strips])
    return PackedLinear(weight_format, shape, memory, has_minima=has_minima, bias=bias)


def outline(weight: Tensor | GroupedWeight, *, gated: bool = False) -> PackedLinear:
    """Return what packing would, of the same size and with no memory behind it.

    weight: may lie on the meta device, as may the levels of a quantised one. Raises ValueError for
    sizes that the kernels do not serve.
    """
    shape = _check_sizes(weight.shape, gated)
    weight_format, has_minima = WeightFormat.BF16, False
    if isinstance(weight, GroupedWeight):
        weight_format, has_minima = _format_of(weight), weight.minima is not None
    num_bytes = _packed_bytes(shape, weight_format, has_minima=has_minima)
    nothing = np.broadcast_to(np.zeros(1, np.uint8), num_bytes)
    return PackedLinear(weight_format, shape, nothing, has_minima=has_minima)


def _format_of(weight: GroupedWeight) -> WeightFormat:
    return WeightFormat.Q4 if weight.bits == 4 else WeightFormat.Q8


def _packed_bytes(
    shape: tuple[int, int], weight_format: WeightFormat, *, has_minima: bool = False
) -> int:
    rows = -(-shape[0] // STRIP_OUTPUTS) * STRIP_OUTPUTS
    if weight_format is WeightFormat.BF16:
        return rows * shape[1] * 2
    bits = 4 if weight_format is WeightFormat.Q4 else 8
    group_bytes = GROUP_INPUTS * bits // 8 + 2 * (1 + has_minima)
    return rows * shape[1] // GROUP_INPUTS * group_bytes


def _pack_strips(weight: GroupedWeight, rows: slice, packed: Tensor) -> None:
    """Pack some rows of a matrix. packed: uint8 [strips, groups, 2 tiles, bytes]."""
    part = weight.map(lambda values: _rows_of_strips(values[rows]))
    num_groups = packed.shape[1]
    # [strips, groups, 2 tiles, 8 steps, 16 outputs, 4 inputs]
    levels = part.levels.view(-1, 2, TILE_OUTPUTS, num_groups, 8, 4).permute(0, 3, 1, 4, 2, 5)
    if weight.bits == 4:
        levels = levels[:, :, :, :4] | (levels[:, :, :, 4:] << 4)
    levels = levels.flatten(3)
    end = levels.shape[-1]
    packed[..., :end] = levels
    for halves in (part.scales, part.minima):
        if halves is not None:
            tiled = halves.view(-1, 2, TILE_OUTPUTS, num_groups).permute(0, 3, 1, 2)
            packed[..., end : end + 2 * TILE_OUTPUTS] = tiled.contiguous().view(torch.uint8)
            end += 2 * TILE_OUTPUTS


def _chunks(num_strips: int, inputs: int) -> Iterator[tuple[slice, slice]]:
    """Some strips at a time, and their rows: packing takes several times their size meanwhile."""
    step = max(_CHUNK_ELEMENTS // (STRIP_OUTPUTS * inputs), 1)
    for start in range(0, num_strips, step):
        yield (
            slice(start, start + step),
            slice(start * STRIP_OUTPUTS, (start + step) * STRIP_OUTPUTS),
        )


def _in_groups(weight: Tensor) -> Tensor:
    """The values as float32 [outputs, groups, 32]."""
    outputs, _ = _check_sizes(weight.shape, gated=False)
    return weight.float().view(outputs, -1, GROUP_INPUTS)


def _check_sizes(shape: Sequence[int], gated: bool) -> tuple[int, int]:
    outputs, inputs = shape
    if inputs % GROUP_INPUTS:
        raise ValueError(f"the kernels take inputs in groups of {GROUP_INPUTS}, not {inputs}")
    if gated and outputs % STRIP_OUTPUTS:
        raise ValueError(f"gates come in tiles of {TILE_OUTPUTS}, not {outputs // 2} of them")
    return outputs, inputs


def _alternate_tiles(rows: Optional) -> Optional:
    """Put the tiles of the second half of the rows between those of the first."""
    if rows is None:
        return None
    halves = rows.view(2, -1, TILE_OUTPUTS, *rows.shape[1:])
    return halves.transpose(0, 1).reshape(rows.shape)


def _rows_of_strips(rows: Tensor) -> Tensor:
    """Pad rows with zeros to whole strips."""
    padding = -len(rows) % STRIP_OUTPUTS
    if not padding:
        return rows.contiguous()
    return torch.cat((rows, rows.new_zeros(padding, *rows.shape[1:])))


class _Arena:
    """Memory for matrices, one after the other in large pages where the system has any.

    A step reads all weights: with small pages it would spend time on finding them.
    """

    def __init__(self) -> None:
        self._chunk = np.empty(0, np.uint8)

    def take(self, num_bytes: int) -> npt.NDArray[np.uint8]:
        """Return memory that begins on a cache line."""
        if num_bytes > len(self._chunk):
            self._chunk = zero_pages(max(num_bytes, _ARENA_BYTES))
        memory, rest = np.split(self._chunk, [num_bytes])
        self._chunk = rest[-num_bytes % _ALIGNMENT :]
        return memory


_arena = _Arena()


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
