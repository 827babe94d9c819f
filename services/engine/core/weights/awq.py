"""Projections as AWQ's checkpoints store them, 4 bits with zero points.

Lin et al., arXiv:2306.00978. Of a projection with N inputs and M outputs in G groups:

    qweight  int32 [N, M / 8]  levels of eight outputs, in the order below
    qzeros   int32 [G, M / 8]  zero points, packed alike
    scales   float [G, M]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from services.engine.core.weights.gptq import group_count, read_group_size
from services.engine.core.weights.packed_integers import unpack
from services.engine.core.weights.stored_linear import StoredLinear
from services.engine.core.weights.tensor_files import FLOAT_TYPES, TensorEntry, check_part
from services.runtime.modelfiles.fields import Fields

_BITS = 4
_KINDS = ("qweight", "qzeros", "scales")
# Where in a word, counted from its lowest bits, each of its eight outputs lies.
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)


@dataclass(frozen=True, slots=True)
class AWQ:
    """AWQ's checkpoints of the "gemm" kind; see `schemes.Scheme`."""

    group_size: int

    @staticmethod
    def from_config(config: Fields) -> AWQ:
        """Read `quantization_config`; raises ModelFileError for what cannot be read."""
        if (bits := config.integer("bits")) != _BITS:
            raise config.error("bits", f"{bits} is not supported, only 4 is")
        if (version := config.text("version", "gemm").lower()) != "gemm":
            raise config.error("version", f"{version!r} is not supported, only 'gemm' is")
        if not config.flag("zero_point", default=True):
            raise config.error("zero_point", "weights without zero points are not supported")
        return AWQ(read_group_size(config))

    def __str__(self) -> str:
        return f"AWQ {_BITS} bits"

    def owns(self, kind: str, entry: TensorEntry) -> bool:
        return kind in _KINDS

    def shape(self, parts: Mapping[str, TensorEntry]) -> tuple[int, int]:
        inputs, words = check_part(parts, "qweight", ("I32",), (None, None))
        groups = group_count(inputs, self.group_size)
        check_part(parts, "qzeros", ("I32",), (groups, words))
        check_part(parts, "scales", FLOAT_TYPES, (groups, words * 8))
        return words * 8, inputs

    def read(self, parts: Mapping[str, Tensor]) -> StoredLinear:
        return StoredLinear(
            _unpack(parts["qweight"]).T.contiguous(),
            parts["scales"].T,
            _unpack(parts["qzeros"]).to(torch.int16).T,
            _BITS,
        )


def _unpack(words: Tensor) -> Tensor:
    return unpack(words, _BITS)[..., list(_PLACES)].flatten(1)
