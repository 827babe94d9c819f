"""Projections as compressed-tensors stores them: integers of 8 bits, or of 4 or 8 packed in words.

Those of eight-bit floats are in fp8.py.

https://github.com/vllm-project/compressed-tensors. Of a projection with N inputs and M outputs in G
groups (1 for scales by output, or one scale for the whole matrix):

    int-quantized  weight             int8  [M, N]
                   weight_zero_point  int8  [M, G], where weights are not symmetric
    pack-quantized weight_packed      int32 [M, N * bits / 32]  levels plus 2**(bits - 1)
                   weight_zero_point  int32 [M * bits / 32, G]  packed down the rows alike
                   weight_shape       int64 [2]
    both           weight_scale       float [M, G] or [1]
                   weight_g_idx       int32 [N], where inputs are grouped in an order of their own

Activations are rounded to int8 by the kernels as they come, so the scales of quantised inputs, one
for all tokens or one for each, are not needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from services.engine.core.weights.fp8 import FP8, read_float_groups
from services.engine.core.weights.gptq import group_order
from services.engine.core.weights.packed_integers import unpack_columns, unpack_rows
from services.engine.core.weights.stored_linear import StoredLinear
from services.engine.core.weights.tensor_files import FLOAT_TYPES, TensorEntry, check_part
from services.runtime.modelfiles.fields import Fields

_INTEGERS = ("int-quantized", "pack-quantized")
_FLOATS = "float-quantized"
_KINDS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
_OF_ACTIVATIONS = ("input_scale", "input_zero_point")


@dataclass(frozen=True, slots=True)
class CompressedTensors:
    """What a checkpoint's projections have in common; see `schemes.Scheme`.

    widths: in bits; where there are several, a projection's own follows from its words and its
    groups of `group_size` inputs.
    """

    widths: tuple[int, ...]
    group_size: int | None = None

    def __str__(self) -> str:
        return f"compressed-tensors {' and '.join(map(str, self.widths))} bits"

    def _bits(self, words: int, scales: tuple[int, ...]) -> int:
        if len(self.widths) == 1:
            return self.widths[0]
        assert self.group_size is not None
        inputs = (scales[1] if len(scales) == 2 else 0) * self.group_size
        bits = words * 32 // max(inputs, 1)
        if bits not in self.widths or words * 32 != inputs * bits:
            raise ValueError(f"{words} words do not hold {inputs} inputs of {self} each")
        return bits

    def owns(self, kind: str, entry: TensorEntry) -> bool:
        is_levels = kind == "weight" and entry.dtype == "I8"
        return is_levels or kind in _KINDS or kind in _OF_ACTIVATIONS

    def shape(self, parts: Mapping[str, TensorEntry]) -> tuple[int, int]:
        packed, bits = "weight_packed" in parts, 8
        if packed:
            outputs, words = check_part(parts, "weight_packed", ("I32",), (None, None))
            if "weight_scale" not in parts:
                raise ValueError("has no weight_scale")
            bits = self._bits(words, parts["weight_scale"].shape)
            inputs = words * 32 // bits
        else:
            outputs, inputs = check_part(parts, "weight", ("I8",), (None, None))
        groups = self._groups(parts, outputs, inputs)
        if "weight_zero_point" in parts:
            if packed:
                rows = outputs * bits // 32
                check_part(parts, "weight_zero_point", ("I32",), (rows, groups))
            else:
                check_part(parts, "weight_zero_point", ("I8",), parts["weight_scale"].shape)
        if "weight_g_idx" in parts:
            check_part(parts, "weight_g_idx", ("I32",), (inputs,))
        return outputs, inputs

    def _groups(self, parts: Mapping[str, TensorEntry], outputs: int, inputs: int) -> int:
        if "weight_scale" not in parts:
            raise ValueError("has no weight_scale")
        if parts["weight_scale"].shape in ((), (1,), (1, 1)):
            check_part(parts, "weight_scale", FLOAT_TYPES, parts["weight_scale"].shape)
            return 1
        _, groups = check_part(parts, "weight_scale", FLOAT_TYPES, (outputs, None))
        if groups < 1 or inputs % groups:
            raise ValueError(f"{inputs} inputs are no {groups} whole groups")
        return groups

    def read(self, parts: Mapping[str, Tensor]) -> StoredLinear:
        bits = 8
        if (packed := parts.get("weight_packed")) is not None:
            bits = self._bits(packed.shape[1], tuple(parts["weight_scale"].shape))
            levels = unpack_columns(packed, bits)
        else:
            levels = parts["weight"].view(torch.uint8) ^ 0x80
        outputs, inputs = levels.shape
        scale = parts["weight_scale"]
        scales = (scale.view(1, 1) if scale.numel() == 1 else scale).expand(outputs, -1)
        middle = 1 << (bits - 1)
        zeros = torch.full(scales.shape, middle, dtype=torch.int16)
        if (stored := parts.get("weight_zero_point")) is not None:
            if stored.dtype == torch.int32:
                zeros = unpack_rows(stored, bits).to(torch.int16)
            else:
                zeros = (stored.to(torch.int16) + middle).view(-1, scales.shape[1])
                zeros = zeros.expand(scales.shape)
        order = group_order(parts.get("weight_g_idx"), inputs, scales.shape[1])
        return StoredLinear(levels, scales, zeros, bits, order)


def read_compressed_tensors(config: Fields) -> CompressedTensors | FP8:
    """Read `quantization_config`; raises ModelFileError for what cannot be read."""
    written = config.text("format")
    if written not in (*_INTEGERS, _FLOATS):
        known = ", ".join((*_INTEGERS, _FLOATS))
        raise config.error("format", f"{written!r} is not supported, only {known} are")
    groups = config.table("config_groups")
    if groups is None or not groups.raw:
        raise config.error("config_groups", "names no group of modules")
    if written == _FLOATS:
        return read_float_groups(groups)
    found = {_read_group(groups, name, written) for name in groups.raw}
    widths = tuple(sorted({bits for bits, _ in found}))
    if len(widths) == 1:
        return CompressedTensors(widths)
    sizes = {size for _, size in found}
    if len(sizes) > 1 or min(sizes) < 1:
        problem = "weights of several widths are only supported in groups of one size"
        raise config.error("config_groups", problem)
    return CompressedTensors(widths, sizes.pop())


def _read_group(groups: Fields, name: str, written: str) -> tuple[int, int]:
    """The bits of a group of modules, and how many inputs share a scale; -1: all."""
    group = groups.table(name)
    weights = None if group is None else group.table("weights")
    if weights is None:
        raise groups.error(name, "does not say how weights are stored")
    if (kind := weights.text("type", "int")) != "int":
        raise weights.error("type", f"{kind!r} is not supported, only 'int' is")
    bits = weights.integer("num_bits", 8)
    allowed = (8,) if written == "int-quantized" else (4, 8)
    if bits not in allowed:
        raise weights.error("num_bits", f"{bits} is not supported by {written}")
    return bits, weights.integer("group_size", -1)
