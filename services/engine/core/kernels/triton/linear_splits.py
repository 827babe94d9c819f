"""What kernels of projections share: how a product is divided among programs.

One of few rows is split along its inputs, and the parts are added up in a fixed order, so that the
same product has the same bits each time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, TypeAlias

import torch
from torch import Tensor
from triton import cdiv, jit
from triton import language as tl

from services.engine.core.kernels.triton.language import wait_for_earlier
from services.engine.core.kernels.triton.serving import begins_early, early_forms
from services.engine.core.kernels.triton.specialisation import Specialisation

_MOST_SPLITS = 16
_SUM_ELEMENTS = 1024
# Of the device that tensors are on where kernels are interpreted.
_INTERPRETED_MULTIPROCESSORS = 4


@dataclass(frozen=True, slots=True)
class Tile:
    """How a program computes its part: `rows` x `outputs` elements, `inputs` at a time.

    resident: how many programs a multiprocessor is to have. One of few rows has some kilobytes of
    weights under way, and an H100 needs 14 of them for each of its multiprocessors to hide the
    latency of its memory (3 TB/s for 600 ns). Of many rows two are enough, of which one unpacks
    weights while the other multiplies; each split more would write and read `rows` floats of each
    output: 16 of 128 rows are 16 KB an output, whose 4096 weights of four bits are 2 KB.
    """

    rows: int
    outputs: int
    inputs: int
    num_warps: int
    num_stages: int
    resident: int = 4

    @property
    def constants(self) -> dict[str, int]:
        """Those of a kernel."""
        return {
            "tile_rows": self.rows,
            "tile_outputs": self.outputs,
            "tile_inputs": self.inputs,
        }


# By the rows that they serve, in ascending order.
Tiles: TypeAlias = tuple[tuple[int, Tile], ...]


@cache
def multiprocessors(device: torch.device) -> int:
    """How many programs a device runs side by side, at one for each multiprocessor."""
    if device.type != "cuda":
        return _INTERPRETED_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


@dataclass(frozen=True, slots=True)
class Division:
    """How a product is divided: into tiles of rows and of outputs, and each along the inputs, of
    which a split takes `steps_of_split` tiles."""

    tile: Tile
    row_tiles: int
    column_tiles: int
    splits: int
    steps_of_split: int
    is_whole: bool  # whether the inputs are whole tiles

    @classmethod
    def of(cls, tiles: Tiles, rows: int, weight: tuple[int, ...], device: torch.device) -> Division:
        """weight: its shape, outputs and inputs."""
        return _divided(tiles, rows, weight[0], weight[1], device)

    @property
    def options(self) -> dict[str, Any]:
        """What a kernel of these tiles is launched with."""
        return {
            "is_whole": self.is_whole,
            "is_split": self.splits > 1,
            "num_warps": self.tile.num_warps,
            "num_stages": self.tile.num_stages,
            **self.tile.constants,
        }

    def compute(self, run: Callable[[Tensor], None], bias: Tensor | None, output: Tensor) -> None:
        """Run a kernel, which is given where it is to write: `output`, contiguous, with the bias,
        or parts, [splits, rows, outputs] float32, that are added up."""
        if self.splits == 1:
            run(output)
            return
        parts = output.new_empty(self.splits, *output.shape, dtype=torch.float32)
        run(parts)
        sum_splits(parts, bias, output)


@lru_cache(maxsize=1 << 10)
def _divided(tiles: Tiles, rows: int, outputs: int, inputs: int, device: torch.device) -> Division:
    tile = next(tile for most, tile in tiles if rows <= most)
    row_tiles, column_tiles = cdiv(rows, tile.rows), cdiv(outputs, tile.outputs)
    steps = cdiv(inputs, tile.inputs)
    wanted = tile.resident * multiprocessors(device) // (row_tiles * column_tiles)
    # A split of fewer steps than are under way at once would not fill its pipeline.
    splits = max(1, min(wanted, _MOST_SPLITS, steps // tile.num_stages))
    steps_of_split = cdiv(steps, splits)
    splits = cdiv(steps, steps_of_split)
    return Division(
        tile, row_tiles, column_tiles, splits, steps_of_split, inputs % tile.inputs == 0
    )


@jit(do_not_specialize=["elements"])
def sum_splits_kernel(  # type: ignore[no-untyped-def]
    parts,
    bias,
    output,
    elements,
    outputs,
    splits: tl.constexpr,
    tile: tl.constexpr,
    is_early: tl.constexpr,
):
    """Add up parts, [splits, rows, outputs] float32, and the bias."""
    wait_for_earlier(is_early)
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
        parts,
        bias,
        output,
        elements,
        output.shape[1],
        splits=splits,
        tile=_SUM_ELEMENTS,
        **begins_early(output.device),
    )


COMPILED = early_forms(
    Specialisation(
        sum_splits_kernel,
        {"parts": "*fp32", "output": "*bf16", "elements": "i32", "outputs": "i32:16"} | bias,
        {"splits": splits, "tile": _SUM_ELEMENTS} | ({} if bias else {"bias": None}),
    )
    for splits in (2, 8)
    for bias in ({}, {"bias": "*bf16"})
)
