"""How the integers of a step reach the device."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


class Staging:
    """A host array and its twin on the device. On a CPU they share their memory.

    One step at a time is in flight: sampling waits for the device, so the host array may be filled
    again as soon as a step has returned.
    """

    def __init__(self, size: int, dtype: Any, device: torch.device) -> None:
        if device.type == "cpu":
            self.host = np.zeros(size, dtype)
            self._source = self._device = torch.from_numpy(self.host)
        else:
            torch_dtype = torch.from_numpy(np.zeros(0, dtype)).dtype
            self._source = torch.zeros(size, dtype=torch_dtype, pin_memory=True)
            self.host = self._source.numpy()
            self._device = torch.zeros(size, dtype=torch_dtype, device=device)

    def to_device(self, size: int) -> Tensor:
        """The first `size` elements as they are now, on the device."""
        part = self._device[:size]
        if self._device is not self._source:
            part.copy_(self._source[:size], non_blocking=True)
        return part
