"""How the integers of a step reach the device."""

from __future__ import annotations

import math
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


class Staging:
    """A host array and its twin on the device. On a CPU they share their memory.

    One step at a time is in flight: sampling waits for the device, so the host array may be filled
    again as soon as a step has returned.
    """

    def __init__(self, size: int, dtype: Any, device: torch.device) -> None:
        self._source = torch.from_numpy(np.zeros(size, dtype))
        self._device = self._source
        if device.type != "cpu":
            self._source = self._source.pin_memory()
            self._device = self._source.to(device)
        self._shapes: tuple[tuple[int, ...], ...] = ()
        self._host: list[npt.NDArray[Any]] = []
        self._tensors: list[Tensor] = []
        self._size = 0

    def cut(self, *shapes: tuple[int, ...]) -> list[npt.NDArray[Any]]:
        """Arrays of these shapes to be filled, one after the other in the host array.

        Steps of the same shapes get the same arrays, and tensors: most steps decode as before.
        """
        if shapes != self._shapes:
            ends = list(accumulate(map(math.prod, shapes)))
            places = [
                (slice(end - math.prod(shape), end), shape)
                for end, shape in zip(ends, shapes, strict=True)
            ]
            self._host = [self._source[place].view(shape).numpy() for place, shape in places]
            self._tensors = [self._device[place].view(shape) for place, shape in places]
            self._size = ends[-1]
            self._shapes = shapes
        return self._host

    def to_device(self) -> list[Tensor]:
        """What the arrays of the latest `cut` hold now, on the device."""
        if self._device is not self._source:
            # In one transfer.
            self._device[: self._size].copy_(self._source[: self._size], non_blocking=True)
        return self._tensors
