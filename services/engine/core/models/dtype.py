"""Which number format a model computes in."""

from __future__ import annotations

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# x86 instructions that multiply bfloat16 directly. Without them torch converts to float32 at every
# step and bfloat16 is the slower of the two; with them the step reads half the bytes.
_CPU_BFLOAT16 = ("avx512_bf16", "amx_bf16")


def resolve_dtype(name: str, device: torch.device | str) -> torch.dtype:
    """Return the dtype that `name` means on a device.

    "auto" is bfloat16 on CUDA, and on a CPU whose instruction set multiplies it directly; else
    float32. Raises ValueError for a name that is neither "auto" nor in DTYPES.
    """
    if name != "auto":
        if name not in DTYPES:
            raise ValueError(f"dtype {name!r} is not one of auto, {', '.join(DTYPES)}")
        return DTYPES[name]
    if torch.device(device).type == "cuda":
        return torch.bfloat16
    capabilities = torch.cpu.get_capabilities()
    fast = any(capabilities.get(feature, False) for feature in _CPU_BFLOAT16)
    return torch.bfloat16 if fast else torch.float32
