"""What kernels in Triton serve, and what a card has not."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

FLOATS = frozenset((torch.bfloat16, torch.float16, torch.float32))


@cache
def converts_fp8(device: torch.device) -> bool:
    """Whether a device converts to float8_e4m3fn itself: cards from Ada on do."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def as_bytes(tensor: Tensor) -> Tensor:
    """Eight-bit floats as bytes, which every card can load and store; others as they are."""
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor
