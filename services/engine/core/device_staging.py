"""How the numbers of a step reach a device while it still computes the step before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

# Of the parts of a transfer: what kernels load at a time.
_ALIGNMENT = 16
# Transfers that may be on their way while the next is filled in.
_DEPTH = 2

_TORCH_DTYPES = {np.dtype(np.int64): torch.int64, np.dtype(np.int32): torch.int32}


class DeviceStaging:
    """Brings arrays to a device in one transfer, without waiting for it.

    On the device they have one place, which the next transfer overwrites: it comes behind whatever
    was launched to read them. On the host there are several, each free again once its transfer has
    ended. Arrays of the same shapes always get the same places, so that what was captured in a
    graph finds them there.
    """

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self._there = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        self._is_cuda = device.type == "cuda"
        hosts = [torch.zeros(num_bytes, dtype=torch.uint8) for _ in range(_DEPTH)]
        self._hosts = [each.pin_memory() for each in hosts] if self._is_cuda else hosts
        self._arrays = [each.numpy() for each in self._hosts]
        self._sent: list[Any] = [None] * _DEPTH  # an event behind the latest transfer of each
        self._next = 0

    @staticmethod
    def bytes_for(*counts: tuple[int, int]) -> int:
        """Bytes that hold parts of so many elements of so many bytes each."""
        return sum(_aligned(count * size) for count, size in counts)

    def send(self, arrays: Sequence[npt.NDArray[Any]]) -> list[Tensor]:
        """Return the arrays on the device. Precondition: together they fit."""
        index = self._next
        self._next = (index + 1) % _DEPTH
        if self._sent[index] is not None:
            self._sent[index].synchronize()
        host, places, end = self._arrays[index], [], 0
        for array in arrays:
            begin, end = end, end + array.nbytes
            host[begin:end].view(array.dtype).reshape(array.shape)[...] = array
            places.append((begin, end))
            end = _aligned(end)
        self._there[:end].copy_(self._hosts[index][:end], non_blocking=True)
        if self._is_cuda:
            self._sent[index] = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._sent[index].record()
        return [
            self._there[begin:end].view(_TORCH_DTYPES[array.dtype]).view(array.shape)
            for array, (begin, end) in zip(arrays, places, strict=True)
        ]


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
