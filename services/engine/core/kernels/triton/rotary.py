"""The angles of a step's positions in Triton: one launch, where plain torch has nine."""

from __future__ import annotations

import torch
from torch import Tensor
from triton import jit, next_power_of_2
from triton import language as tl

from services.engine.core.kernels.rotary import rotary_angles
from services.engine.core.kernels.triton import why_not
from services.engine.core.kernels.triton.language import rounded, wait_for_earlier
from services.engine.core.kernels.triton.serving import FLOATS, begins_early, early_forms
from services.engine.core.kernels.triton.specialisation import Specialisation


@jit
def rotary_angles_kernel(  # type: ignore[no-untyped-def]
    positions,
    frequencies,
    cos,
    sin,
    amplitude,
    half: tl.constexpr,
    tile: tl.constexpr,
    is_early: tl.constexpr,
):
    """One token."""
    wait_for_earlier(is_early)
    token = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, tile)
    inside = pair < half
    position = tl.load(positions + token).to(tl.float32)
    angle = position * tl.load(frequencies + pair, inside, other=0.0)
    cosine = rounded(tl.cos(angle) * amplitude, cos.dtype.element_ty)
    sine = tl.sin(angle) * amplitude
    row = token * 2 * half + pair
    tl.store(cos + row, cosine, inside)
    tl.store(cos + row + half, cosine, inside)
    tl.store(sin + row, rounded(-sine, sin.dtype.element_ty), inside)
    tl.store(sin + row + half, rounded(sine, sin.dtype.element_ty), inside)


@rotary_angles.implementation("cuda", name="triton", unavailable=why_not)
def rotary_angles_triton(
    positions: Tensor, frequencies: Tensor, amplitude: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """positions: contiguous."""
    if dtype not in FLOATS or not positions.is_contiguous():
        return rotary_angles.reference(positions, frequencies, amplitude, dtype)
    half = len(frequencies)
    shape = (len(positions), 1, 2 * half)
    cos = torch.empty(shape, dtype=dtype, device=positions.device)
    sin = torch.empty(shape, dtype=dtype, device=positions.device)
    if len(positions):
        rotary_angles_kernel[(len(positions),)](
            positions,
            frequencies,
            cos,
            sin,
            float(amplitude),
            half=half,
            tile=next_power_of_2(half),
            num_warps=1,
            **begins_early(positions.device),
        )
    return cos, sin


COMPILED = early_forms(
    Specialisation(
        rotary_angles_kernel,
        {
            "positions": "*i64",
            "frequencies": "*fp32",
            "cos": kind,
            "sin": kind,
            "amplitude": "fp32",
        },
        {"half": half, "tile": next_power_of_2(half)},
        num_warps=1,
        spills="no, but the digits of angles of many turns are an array",
    )
    for kind, half in (("*bf16", 64), ("*bf16", 36), ("*fp16", 32), ("*fp32", 128))
)
