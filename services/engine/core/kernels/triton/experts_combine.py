"""Adding up what the experts of a token made of it, in Triton."""

from __future__ import annotations

from torch import Tensor
from triton import cdiv, jit
from triton import language as tl

from services.engine.core.kernels.triton.language import rounded, wait_for_earlier
from services.engine.core.kernels.triton.serving import begins_early, early_forms
from services.engine.core.kernels.triton.specialisation import Specialisation

_TILE = 1024


@jit
def combine_kernel(  # type: ignore[no-untyped-def]
    outer,
    output,
    per_token: tl.constexpr,
    size: tl.constexpr,
    tile: tl.constexpr,
    is_early: tl.constexpr,
):
    """The sum of what a token's experts made of it, always in the same order."""
    wait_for_earlier(is_early)
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * tile + tl.arange(0, tile)
    summed = tl.zeros((tile,), tl.float32)
    for index in tl.static_range(per_token):
        row = outer + (token * per_token + index) * size
        summed += tl.load(row + column, column < size, other=0.0).to(tl.float32)
    tl.store(
        output + token * size + column, rounded(summed, output.dtype.element_ty), column < size
    )


def combine(outer: Tensor, per_token: int) -> Tensor:
    """The sums of what experts made of each token, [choices, size] -> [num_tokens, size]."""
    num_tokens, size = len(outer) // per_token, outer.shape[1]
    output = outer.new_empty(num_tokens, size)
    combine_kernel[(num_tokens, cdiv(size, _TILE))](
        outer,
        output,
        per_token=per_token,
        size=size,
        tile=_TILE,
        num_warps=4,
        **begins_early(outer.device),
    )
    return output


# Mixtral 8x7B and Qwen3 30B-A3B.
COMPILED = early_forms(
    Specialisation(
        combine_kernel,
        {"outer": kind, "output": kind},
        {"per_token": per_token, "size": size, "tile": _TILE},
    )
    for kind, per_token, size in (("*bf16", 2, 4096), ("*fp16", 8, 2048))
)
