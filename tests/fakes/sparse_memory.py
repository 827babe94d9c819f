"""Tensors larger than the machine's memory, of which pages exist once they are written."""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

# MAP_NORESERVE of Linux, which Python has no name for before 3.13.
_FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000


def sparse(
    shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, *, before: int = 1 << 32
) -> Tensor:
    """Zeros of a shape that lie `stride` elements apart, with `before` elements of memory in front.

    An offset that was cut off at 32 bits leads there: what is found is wrong, but it is found.
    """
    span = sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) + 1
    memory = mmap.mmap(-1, (before + span) * dtype.itemsize, flags=_FLAGS)
    flat = torch.frombuffer(memory, dtype=torch.uint8).view(dtype)
    return flat.as_strided(shape, stride, before)
