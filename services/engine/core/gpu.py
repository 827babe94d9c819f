"""How busy the GPU is that a core computes on."""

from __future__ import annotations

import torch

from services.engine.core.messages import GpuUse


def gpu_use(device: str) -> GpuUse | None:
    """What the driver says of `device`, such as `cuda:0`; None for one that is no GPU."""
    if not device.startswith("cuda"):
        return None
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    return GpuUse(
        memory_used_bytes=total_bytes - free_bytes,
        memory_bytes=total_bytes,
        utilization=_utilization(device),
    )


def _utilization(device: str) -> float | None:
    try:
        return torch.cuda.utilization(device) / 100
    except Exception:  # of the driver's management library, which has many kinds
        # In some containers it is not there, and of a slice of a GPU it does not tell.
        return None
