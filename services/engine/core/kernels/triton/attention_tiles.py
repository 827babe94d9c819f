"""How the kernels of attention are cut: the one place where sizes are chosen, by the card.

They follow from what a multiprocessor has. Shared memory: 227 KiB a program on Hopper and Blackwell
for data centres, 163 on A100, 99 on the rest; a stage of the pipeline holds a tile of keys and one
of values. Registers: 65,536, 255 a thread at the most; a row of the output accumulated in float32
is `head_dim` of them, over the threads of a program.

Nothing here has been measured on a card yet: sizes are those that the compiler finds registers for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, lru_cache

import torch
from triton import cdiv, next_power_of_2

# So many parts of a sequence at the most: those that are read again have to stay few.
MAX_SPLITS = 64
# A sequence that is longer is divided even where there are enough others to fill the card: so that
# the last one does not run alone for long.
LONGEST_PART_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class Card:
    """What kernels are cut for.

    Attributes:
        capability: 80 for 8.0.
        num_multiprocessors: of them.
    """

    capability: int
    num_multiprocessors: int

    @staticmethod
    @cache
    def of(device: torch.device) -> Card:
        """The card that is the device; where kernels are interpreted, an H100."""
        if device.type != "cuda":
            return Card(90, 132)
        properties = torch.cuda.get_device_properties(device)
        return Card(10 * properties.major + properties.minor, int(properties.multi_processor_count))

    @property
    def shared_kib(self) -> int:
        """Shared memory that a program can have."""
        if self.capability in (90, 100, 103):
            return 227
        return 163 if self.capability in (80, 87) else 99

    @property
    def converts_fp8(self) -> bool:
        """Whether there are instructions for eight-bit floats."""
        return self.capability >= 89


@dataclass(frozen=True, slots=True)
class Tiles:
    """How a kernel is cut and compiled.

    Attributes:
        rows: of queries (heads of a KV head times queries) that a program has.
        tokens: of the cache that it has at a time.
        num_stages: tiles of keys and values come (num_stages - 1) // 2 tiles ahead: the block table
            has to come before them.
        resident: programs that a multiprocessor has room for.
        scores_ahead: whether the matrix units compute the scores of the next tile while those of
            this one become weights.
    """

    rows: int
    tokens: int
    num_warps: int
    num_stages: int
    resident: int = 1
    scores_ahead: bool = False


@lru_cache
def decode_tiles(card: Card, head_dim: int, kv_dtype: torch.dtype, num_rows: int) -> Tiles:
    """For programs that read the cache for up to `num_rows` rows.

    The matrix units take 16 rows at least. Tiles of 8,192 elements and 128 threads need 128
    registers a thread for 16 rows of bfloat16, 165 of eight-bit floats, and twice the tile is
    spilled. On Hopper two of them ahead are 64 KiB, for three programs of a multiprocessor: what is
    under way is several times the 20 KiB that keep memory busy. Elsewhere they are half as large.
    """
    width = next_power_of_2(head_dim)
    rows = min(max(next_power_of_2(num_rows), 16), max(8192 // width, 16), 64)
    stage_bytes = 32768 if card.shared_kib > 200 else 16384
    tokens = min(8192 // width, stage_bytes // (2 * width * kv_dtype.itemsize))
    return Tiles(rows, max(tokens, 16), num_warps=4, num_stages=5, resident=3 if rows == 16 else 2)


@lru_cache(maxsize=4096)
def decode_splits(card: Card, programs: int, num_tiles: int, tiles: Tiles) -> tuple[int, int]:
    """In how many parts to divide sequences of up to `num_tiles` tiles, and the least tiles of one.

    programs: there are without dividing. The fewest parts whose programs keep multiprocessors as
    busy as any number of parts would, but for a seventh: the last wave of programs is seldom full.
    """
    places = tiles.resident * card.num_multiprocessors
    most = max(1, min(MAX_SPLITS, num_tiles))

    def busy(splits: int) -> float:
        waves = programs * splits / places
        return waves / math.ceil(waves)

    best = max(busy(splits) for splits in range(1, most + 1))
    splits = next(each for each in range(1, most + 1) if busy(each) >= best * 6 / 7)
    if splits > 1:
        return splits, 1
    least = cdiv(LONGEST_PART_TOKENS, tiles.tokens)
    return min(cdiv(num_tiles, least), MAX_SPLITS), least


@lru_cache
def extend_tiles(card: Card, head_dim: int, kv_dtype: torch.dtype) -> Tiles:
    """For programs that compute the output of many queries.

    On Hopper two groups of four warps have 64 rows each, which is what an instruction of the matrix
    units takes: with tiles of 64 tokens all 255 registers a thread at head_dim 128, the scores of
    the next tile among them, and 128 tokens are spilled. Shared memory holds queries, and two tiles
    ahead beside the one that is computed: 145 KiB. On other cards keys and values pass through
    registers, so that there is room for half: up to 230 registers and 48 KiB, which the smallest
    have. Products of float32 take three times the room.
    """
    width = next_power_of_2(head_dim)
    if kv_dtype == torch.float32:
        return Tiles(min(max(4096 // width, 16), 64), 16, num_warps=4, num_stages=3)
    if card.capability == 90 and width <= 256:
        return Tiles(
            128,
            64,
            num_warps=8,
            num_stages=5 if width <= 128 else 3,
            scores_ahead=width <= 128 and kv_dtype.itemsize == 2,
        )
    rows = min(max(16384 // width, 16), 128)
    tokens = min(max(4096 // width, 16), 32)
    return Tiles(rows, tokens, num_warps=8 if rows >= 64 else 4, num_stages=3)
