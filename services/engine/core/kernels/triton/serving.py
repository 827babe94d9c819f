"""What kernels in Triton serve, and what a card has not."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from services.engine.core.kernels.triton.specialisation import HOPPER, Specialisation

FLOATS = frozenset((torch.bfloat16, torch.float16, torch.float32))


@cache
def converts_fp8(device: torch.device) -> bool:
    """Whether a device converts to float8_e4m3fn itself: cards from Ada on do."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def as_bytes(tensor: Tensor) -> Tensor:
    """Eight-bit floats as bytes, which every card can load and store; others as they are."""
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor


@cache
def begins_early(device: torch.device) -> dict[str, Any]:
    """How a kernel is launched whose first act is `wait_for_earlier`: on cards from Hopper on while
    the one before it still runs (programmatic dependent launch), so that it is there when that one
    ends. A step of few tokens is hundreds of kernels of a few microseconds each."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0):
        return {"is_early": True, "launch_pdl": True}
    return {"is_early": False}


def early_forms(forms: Iterable[Specialisation]) -> tuple[Specialisation, ...]:
    """Forms of kernels that may begin early, as they are where none can; and of each kernel one as
    it is where they do."""
    late = [replace(form, constants={**form.constants, "is_early": False}) for form in forms]
    first = {form.kernel.__name__: form for form in reversed(late)}
    return (
        *late,
        *(
            replace(form, constants={**form.constants, "is_early": True}, since=HOPPER)
            for form in first.values()
        ),
    )
