"""How much memory the KV cache may take."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

_CGROUP = Path("/sys/fs/cgroup")
# Of what is free, where nobody chose a share of it.
DEFAULT_FRACTION = 0.5
# Where nobody chose a size, a CPU's KV cache takes no more than this: the memory of a machine
# without an accelerator is seldom the engine's alone.
_CPU_DEFAULT_LIMIT_BYTES = 4 << 30


def free_memory_bytes(device: torch.device) -> int:
    """Memory that this process could still take on `device`, a container's limit included."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free
    free = int(psutil.virtual_memory().available)
    allowance = _cgroup_allowance_bytes()
    return free if allowance is None else min(free, allowance)


def kv_cache_budget_bytes(
    device: torch.device,
    *,
    requested_bytes: int | None,
    fraction: float | None,
    share: float = 1.0,
    waiting_weights_bytes: int = 0,
) -> int:
    """The size of the KV cache: as requested, or a share of `fraction` (None: half) of what is free
    now.

    Where several models share the device, `share` is this one's part of what all caches may take,
    and `waiting_weights_bytes` is what the weights of those will take that are not there yet.
    """
    if requested_bytes is not None:
        return requested_bytes
    free = max(0, free_memory_bytes(device) - waiting_weights_bytes)
    budget = int(free * (fraction or DEFAULT_FRACTION))
    if device.type != "cuda":
        budget = min(budget, _CPU_DEFAULT_LIMIT_BYTES)
    return int(budget * share)


def _cgroup_allowance_bytes() -> int | None:
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = (_CGROUP / "memory.current").read_text().strip()
        return None if limit == "max" else max(0, int(limit) - int(used))
    except (OSError, ValueError):
        return None  # no cgroup v2, hence no limit we could read
