"""Projections as GPTQ's checkpoints store them, 4 or 8 bits.

Frantar et al., arXiv:2210.17323. Of a projection with N inputs and M outputs in G groups:

    qweight  int32 [N * bits / 32, M]  levels, lowest input in the lowest bits
    qzeros   int32 [G, M * bits / 32]  zero points; v1 of the format stores each less one
    scales   float [G, M]
    g_idx    int32 [N]                 the group of each input; absent where groups are in order
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from services.engine.core.weights.packed_integers import unpack_columns, unpack_rows
from services.engine.core.weights.stored_linear import StoredLinear
from services.engine.core.weights.tensor_files import FLOAT_TYPES, TensorEntry, check_part
from services.runtime.modelfiles.fields import Fields

_KINDS = ("qweight", "qzeros", "scales", "g_idx")
_ZERO_OFFSETS = {"gptq": 1, "gptq_v2": 0}


@dataclass(frozen=True, slots=True)
class GPTQ:
    """One way of writing GPTQ's checkpoints; see `schemes.Scheme`."""

    bits: int
    group_size: int  # -1: all inputs
    zero_offset: int  # what is to be added to stored zero points
    has_order: bool  # whether g_idx says anything; tools write zeros where it does not

    def __str__(self) -> str:
        return f"GPTQ {self.bits} bits"

    def owns(self, kind: str, entry: TensorEntry) -> bool:
        return kind in _KINDS

    def shape(self, parts: Mapping[str, TensorEntry]) -> tuple[int, int]:
        words, outputs = check_part(parts, "qweight", ("I32",), (None, None))
        inputs = words * 32 // self.bits
        groups = group_count(inputs, self.group_size)
        check_part(parts, "qzeros", ("I32",), (groups, outputs * self.bits // 32))
        check_part(parts, "scales", FLOAT_TYPES, (groups, outputs))
        if "g_idx" in parts:
            check_part(parts, "g_idx", ("I32",), (inputs,))
        return outputs, inputs

    def read(self, parts: Mapping[str, Tensor]) -> StoredLinear:
        zeros = unpack_columns(parts["qzeros"], self.bits).to(torch.int16) + self.zero_offset
        levels = unpack_rows(parts["qweight"], self.bits).T.contiguous()
        groups = zeros.shape[0]
        return StoredLinear(
            levels,
            parts["scales"].T,
            zeros.T,
            self.bits,
            group_order(parts.get("g_idx"), levels.shape[1], groups) if self.has_order else None,
        )


def read_gptq(config: Fields) -> GPTQ:
    """Read `quantization_config`; raises ModelFileError for what cannot be read."""
    bits = config.integer("bits")
    if bits not in (4, 8):
        raise config.error("bits", f"{bits} is not supported, only 4 and 8 are")
    written = config.text("checkpoint_format", "gptq")
    if written not in _ZERO_OFFSETS:
        known = ", ".join(_ZERO_OFFSETS)
        raise config.error("checkpoint_format", f"{written!r} is not supported, only {known} are")
    if config.raw.get("dynamic"):
        raise config.error("dynamic", "precisions of single modules are not supported")
    has_order = config.flag("desc_act", default=True)
    return GPTQ(bits, read_group_size(config), _ZERO_OFFSETS[written], has_order)


def read_group_size(config: Fields) -> int:
    """Return how many inputs share a scale, -1 for all."""
    size = config.integer("group_size", -1)
    if size < 1 and size != -1:
        raise config.error("group_size", f"{size} is neither positive nor -1, which is all inputs")
    return size


def group_count(inputs: int, group_size: int) -> int:
    """Return how many groups there are; raises ValueError where they are not whole."""
    if group_size == -1:
        return 1
    if inputs % group_size:
        raise ValueError(f"{inputs} inputs are no whole groups of {group_size}")
    return inputs // group_size


def group_order(g_idx: Tensor | None, inputs: int, groups: int) -> Tensor | None:
    """Return the group of each input, None where groups follow one another.

    Raises ValueError for an input that is in no group.
    """
    if g_idx is None:
        return None
    order = g_idx.long()
    if bool((order < 0).any()) or bool((order >= groups).any()):
        raise ValueError(f"g_idx names groups other than 0 to {groups - 1}")
    plain = torch.arange(inputs) // (inputs // groups)
    return None if torch.equal(order, plain) else order
