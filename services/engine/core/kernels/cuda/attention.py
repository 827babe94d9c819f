"""Attention of few queries per sequence over the paged cache, in CUDA C++.

src/attention_decode_kernel.h says how it is computed, and what bounds it. Longer queries are left
to the next best implementation.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache, lru_cache

import torch
from torch import Tensor

from services.engine.core.kernels.attention import AttentionMetadata, paged_attention
from services.engine.core.kernels.cuda.library import FORMATS, beneath, call, is_aligned, why_not
from services.engine.core.kernels.kv_layer import KVLayer

HEAD_DIMS = (64, 128, 256)
# Queries of a sequence times query heads of a KV head. Beyond that it is products that count.
MAX_ROWS = 64
# As the sources have them.
_STAGES = 3
_MAX_WARPS = 8
# What a part costs besides its tokens, in tiles of them: finding its blocks, filling the pipeline,
# adding up. A tile takes 0.36 us of a multiprocessor's share of an H100's bandwidth.
_PART_OVERHEAD = 7
# Parts are no longer where that can be, so that one long sequence does not keep a step waiting.
_LONGEST_PART = 256
_USUAL_TILES = 512
_MOST_SPLITS = 128
_MOST_PART_BYTES = 64 * 2**20


class AttentionDecodeArgs(ctypes.Structure):
    """`struct AttentionDecodeArgs` of src/attention_decode.h, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("queries", "output", "keys", "values")),
        *((name, ctypes.c_void_p) for name in ("key_scales", "value_scales")),
        *((name, ctypes.c_void_p) for name in ("query_starts", "contexts", "block_tables")),
        *((name, ctypes.c_void_p) for name in ("parts", "part_sums", "arrived")),
        *((name, ctypes.c_int64) for name in ("query_stride", "query_head_stride")),
        *((name, ctypes.c_int32) for name in ("block_stride", "token_stride", "head_stride")),
        *((name, ctypes.c_int32) for name in ("scale_block_stride", "scale_token_stride")),
        *((name, ctypes.c_int32) for name in ("table_stride", "sequences", "kv_heads")),
        *((name, ctypes.c_int32) for name in ("heads_per_kv", "head_dim", "rows", "row_tiles")),
        *((name, ctypes.c_int32) for name in ("splits", "least_tiles", "warps")),
        *((name, ctypes.c_int32) for name in ("block_shift", "window", "is_settled")),
        *((name, ctypes.c_float) for name in ("scale", "softcap")),
        *((name, ctypes.c_int32) for name in ("query_format", "cache_format")),
    )


@dataclass(frozen=True, slots=True)
class Card:
    """What a GPU has: multiprocessors, and the shared memory that a block can get."""

    multiprocessors: int
    shared_bytes: int

    @classmethod
    def of(cls, device: torch.device) -> Card:
        """What a device has; off a GPU, an H100."""
        if device.type != "cuda":
            return cls(132, 227 * 1024)
        return _card_of(device)


@cache
def _card_of(device: torch.device) -> Card:
    properties = torch.cuda.get_device_properties(device)
    # Builds of torch for other devices lack it, and their types with them.
    shared_bytes = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
    return Card(properties.multi_processor_count, shared_bytes)


@dataclass(frozen=True, slots=True)
class Division:
    """How the tokens of a step are divided: warps of a block, parts of a sequence at the most, and
    tiles of a part at the least."""

    warps: int
    splits: int
    least_tiles: int


def tile_tokens(head_dim: int, dtype: torch.dtype) -> int:
    """How many tokens a warp reads at a time."""
    return max(16, 4096 // (head_dim * dtype.itemsize))


@lru_cache(maxsize=1024)
def divide(pairs: int, tiles: int, warp_bytes: int, card: Card) -> Division:
    """Divide `tiles` tiles of each of `pairs` sequences and heads among the blocks of a card.

    pairs: sequences times KV heads times tiles of rows; warp_bytes: shared memory of a warp. With
    few of them a block has a multiprocessor to itself, with many two share one. Of the numbers of
    parts it is one whose waves of blocks take the shortest time, each wave its tiles and an
    overhead.
    """
    warps = max(1, min(_MAX_WARPS, card.shared_bytes // warp_bytes))
    blocks_at_once = card.multiprocessors
    if pairs >= 2 * card.multiprocessors and warps > 1:
        warps //= 2
        blocks_at_once *= 2

    # What the host knows may be a bound far above the real lengths. Of longer sequences the number
    # of waves is all that counts, of 8,192 tokens of bf16 their overhead still does.
    usual = min(tiles, _USUAL_TILES)

    def duration(splits: int) -> int:
        waves = -(-pairs * splits // blocks_at_once)
        return waves * (-(-usual // splits) + _PART_OVERHEAD)

    shortest = 2 * warps
    durations = [
        duration(splits) for splits in range(1, 1 + min(_MOST_SPLITS, -(-usual // shortest)))
    ]
    # Of those that take about as long, the most parts: lengths differ, and those even them out.
    bearable = 1.03 * min(durations)
    splits = max(splits for splits, each in enumerate(durations, 1) if each <= bearable)
    if pairs < blocks_at_once:
        return Division(warps, splits, shortest)
    # Shorter sequences of the step are divided into fewer parts, not into as many shorter ones.
    least = max(shortest, min(_LONGEST_PART, -(-usual // splits)))
    # A part that gets nothing takes the time of a block all the same.
    affordable = -(-4 * blocks_at_once // pairs)
    return Division(warps, max(splits, min(affordable, -(-tiles // least))), least)


@paged_attention.implementation("cuda", name="cuda", unavailable=why_not)
def paged_attention_cuda(
    queries: Tensor,
    cache: KVLayer,
    metadata: AttentionMetadata,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    global_tokens: int = 0,
) -> Tensor:
    """Attend to the cached tokens: see the op. Steps of few queries a sequence are served here."""
    if not serves(queries, cache, metadata) or (window is not None and global_tokens > 0):
        attended: Tensor = beneath(paged_attention)(
            queries, cache, metadata, scale, window, softcap, global_tokens
        )
        return attended
    return _attend(queries, cache, metadata, scale, window or 0, softcap or 0.0)


def serves(queries: Tensor, cache: KVLayer, metadata: AttentionMetadata) -> bool:
    """Whether the kernel computes attention of these, whatever the window."""
    keys, values = cache.keys, cache.values
    group = queries.shape[1] // keys.shape[2]
    return (
        queries.dtype in (torch.bfloat16, torch.float16)
        and keys.dtype in (queries.dtype, torch.float8_e4m3fn, torch.int8)
        and queries.shape[2] in HEAD_DIMS
        and metadata.max_query_length * group <= MAX_ROWS
        and metadata.block_size.bit_count() == 1
        and keys.stride() == values.stride()
        and max(keys.stride()) * keys.element_size() < 2**31
        and is_aligned(queries, keys, values)
        and metadata.block_tables.stride(1) == 1
        and _are_alike(cache.key_scales, cache.value_scales)
    )


def _are_alike(key_scales: Tensor | None, value_scales: Tensor | None) -> bool:
    if key_scales is None or value_scales is None:
        return key_scales is value_scales
    return key_scales.stride() == value_scales.stride() and key_scales.stride(2) == 1


def _attend(
    queries: Tensor,
    cache: KVLayer,
    metadata: AttentionMetadata,
    scale: float,
    window: int,
    softcap: float,
) -> Tensor:
    num_tokens, num_heads, head_dim = queries.shape
    output = torch.empty(queries.shape, dtype=queries.dtype, device=queries.device)
    if num_tokens == 0:
        return output
    keys, kv_heads = cache.keys, cache.keys.shape[2]
    group = num_heads // kv_heads
    most_rows = metadata.max_query_length * group
    rows = 8 if most_rows <= 8 or head_dim == 256 else 16
    row_tiles = -(-most_rows // rows)
    pairs = metadata.num_sequences * kv_heads * row_tiles
    tokens = tile_tokens(head_dim, keys.dtype)
    seen = metadata.max_context_length
    if window:
        seen = min(seen, window + metadata.max_query_length + tokens)
    scales = cache.key_scales
    stage_bytes = 2 * tokens * (head_dim * keys.element_size() + (0 if scales is None else 4))
    division = divide(pairs, -(-seen // tokens), _STAGES * stage_bytes, Card.of(queries.device))
    splits = min(division.splits, max(1, _MOST_PART_BYTES // (pairs * rows * head_dim * 4)))
    parts = part_sums = arrived = None
    if splits > 1:
        most = pairs * splits * rows
        parts = torch.empty(most * head_dim, dtype=torch.float32, device=queries.device)
        part_sums = torch.empty(most * 2, dtype=torch.float32, device=queries.device)
        arrived = _counters(queries, pairs)
    lengths = metadata.device_lengths
    block_stride, token_stride, head_stride, _ = (
        stride * keys.element_size() for stride in keys.stride()
    )
    call(
        "attention_decode",
        AttentionDecodeArgs(
            queries=queries.data_ptr(),
            output=output.data_ptr(),
            keys=keys.data_ptr(),
            values=cache.values.data_ptr(),
            key_scales=_address(scales),
            value_scales=_address(cache.value_scales),
            query_starts=lengths.query_starts.data_ptr(),
            contexts=lengths.contexts.data_ptr(),
            block_tables=metadata.block_tables.data_ptr(),
            parts=_address(parts),
            part_sums=_address(part_sums),
            arrived=_address(arrived),
            query_stride=queries.stride(0),
            query_head_stride=queries.stride(1),
            block_stride=block_stride,
            token_stride=token_stride,
            head_stride=head_stride,
            scale_block_stride=0 if scales is None else scales.stride(0),
            scale_token_stride=0 if scales is None else scales.stride(1),
            table_stride=metadata.block_tables.stride(0),
            sequences=metadata.num_sequences,
            kv_heads=kv_heads,
            heads_per_kv=group,
            head_dim=head_dim,
            rows=rows,
            row_tiles=row_tiles,
            splits=splits,
            least_tiles=division.least_tiles,
            warps=division.warps,
            block_shift=metadata.block_size.bit_length() - 1,
            window=window,
            is_settled=metadata.is_settled,
            scale=scale,
            softcap=softcap,
            query_format=FORMATS[queries.dtype],
            cache_format=FORMATS[keys.dtype],
        ),
        queries,
    )
    return output


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


_arrived: dict[tuple[torch.device, int], list[Tensor]] = {}


def _counters(queries: Tensor, pairs: int) -> Tensor:
    """How many parts of each pair are done: zeros, which the kernel leaves as it finds them.

    Those of each stream are its own, since its kernels run one after another. They are kept when
    more are needed: graphs that were captured before count there.
    """
    stream = torch.cuda.current_stream(queries.device).cuda_stream if queries.is_cuda else 0
    known = _arrived.setdefault((queries.device, stream), [])
    if not known or known[-1].numel() < pairs:
        most = max(pairs, 8192)
        known.append(torch.zeros(most, dtype=torch.int32, device=queries.device))
    return known[-1]
