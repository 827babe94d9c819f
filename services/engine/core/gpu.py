"""How busy the GPU is that a core computes on."""

from __future__ import annotations

import functools

import torch

from services.engine.core.messages import GpuUse


def gpu_use(device: str) -> GpuUse | None:
    """What the driver says of `device`, such as `cuda:0`; None for one that is no GPU."""
    if not device.startswith("cuda"):
        return None
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    percent = torch.cuda.utilization(device) if _tells_utilization(device) else None
    return GpuUse(
        memory_used_bytes=total_bytes - free_bytes,
        memory_bytes=total_bytes,
        utilization=None if percent is None else percent / 100,
    )


@functools.cache
def _tells_utilization(device: str) -> bool:
    """Whether the driver's management library is there and knows the device: in some containers,
    and for a slice of a GPU, it does not."""
    try:
        torch.cuda.utilization(device)
    except Exception:  # of the library's own many kinds
        return False
    return True
