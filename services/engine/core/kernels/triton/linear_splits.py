"""What kernels of projections share: a product of few rows is split along its inputs, and the parts
are added up in a fixed order, so that the same product has the same bits each time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from triton import cdiv, jit
from triton import language as tl

from services.engine.core.kernels.triton.specialisation import Specialisation

# A program has some kilobytes of weights under way; an H100 needs 14 of them for each of its
# multiprocessors to hide the latency of its memory (3 TB/s for 600 ns).
PROGRAMS_PER_MULTIPROCESSOR = 4
_MOST_SPLITS = 16
_SUM_ELEMENTS = 1024
# Of the device that tensors are on where kernels are interpreted.
_INTERPRETED_MULTIPROCESSORS = 4


@dataclass(frozen=True, slots=True)
class Tile:
    """How a program computes its part: `rows` x `outputs` elements, `inputs` at a time."""

    rows: int
    outputs: int
    inputs: int
    num_warps: int
    num_stages: int


@cache
def multiprocessors(device: torch.device) -> int:
    """How many programs a device runs side by side, at one for each multiprocessor."""
    if device.type != "cuda":
        return _INTERPRETED_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def split_steps(steps: int, tile: Tile, num_programs: int, device: torch.device) -> int:
    """How many of `steps` tiles along the inputs each split of a product takes: all, unless
    `num_programs`, what an unsplit product has, would leave multiprocessors without work."""
    wanted = PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(device) // num_programs
    # A split of fewer steps than are under way at once would not fill its pipeline.
    splits = max(1, min(wanted, _MOST_SPLITS, steps // tile.num_stages))
    return -(-steps // splits)


@jit(do_not_specialize=["elements"])
def sum_splits_kernel(  # type: ignore[no-untyped-def]
    parts, bias, output, elements, outputs, splits: tl.constexpr, tile: tl.constexpr
):
    """Add up parts, [splits, rows, outputs] float32, and the bias."""
    index = tl.program_id(0) * tile + tl.arange(0, tile)
    inside = index < elements
    total = tl.zeros((tile,), tl.float32)
    for split in tl.static_range(splits):
        total += tl.load(parts + split * elements + index, mask=inside, other=0.0)
    if bias is not None:
        total += tl.load(bias + index % outputs, mask=inside, other=0.0).to(tl.float32)
    tl.store(output + index, total, mask=inside)


def sum_splits(parts: Tensor, bias: Tensor | None, output: Tensor) -> None:
    """Add up parts, [splits, rows, outputs] float32, and the bias into `output`, contiguous."""
    splits, elements = parts.shape[0], output.numel()
    sum_splits_kernel[(cdiv(elements, _SUM_ELEMENTS),)](
        parts, bias, output, elements, output.shape[1], splits=splits, tile=_SUM_ELEMENTS
    )


COMPILED = tuple(
    Specialisation(
        sum_splits_kernel,
        {"parts": "*fp32", "output": "*bf16", "elements": "i32", "outputs": "i32:16"} | bias,
        {"splits": splits, "tile": _SUM_ELEMENTS} | ({} if bias else {"bias": None}),
    )
    for splits in (2, 8)
    for bias in ({}, {"bias": "*bf16"})
)
