"""Attention by FlashInfer (Ye et al., arXiv:2501.01005), where it is installed."""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from services.engine.core.kernels.attention import AttentionMetadata, paged_attention
from services.engine.core.kernels.kv_layer import KVLayer

_MODULE = "flashinfer"
_HEADS = (64, 128, 256)
# What its documentation takes.
_WORKSPACE_BYTES = 128 << 20


def _why_not() -> str | None:
    return None if importlib.util.find_spec(_MODULE) else "FlashInfer is not installed"


@paged_attention.implementation("cuda", name="flashinfer", unavailable=_why_not)
def paged_attention_flashinfer(
    queries: Tensor,
    cache: KVLayer,
    metadata: AttentionMetadata,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    global_tokens: int = 0,
) -> Tensor:
    """See the op. A step is planned once for all layers alike, from what the host knows of it: of a
    step that is captured that is not enough, and such a step is the reference's, as are int8 caches
    and windows beside global tokens."""
    if (
        metadata.are_bounds
        or queries.dtype not in (torch.bfloat16, torch.float16)
        or cache.keys.dtype not in (queries.dtype, torch.float8_e4m3fn)
        or queries.shape[-1] not in _HEADS
        or (global_tokens and window is not None)
    ):
        return paged_attention.reference(
            queries, cache, metadata, scale, window, softcap, global_tokens
        )
    num_heads, head_dim = queries.shape[1:]

    def plan() -> Any:
        flashinfer: Any = importlib.import_module(_MODULE)
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(_workspace(queries.device), "NHD")
        starts, pages, last_page_tokens = _pages(metadata)
        wrapper.plan(
            torch.tensor([0, *accumulate(metadata.query_lengths)], dtype=torch.int32),
            starts,
            pages,
            last_page_tokens,
            num_heads,
            cache.keys.shape[2],
            head_dim,
            metadata.block_size,
            causal=True,
            sm_scale=scale,
            window_left=-1 if window is None else window - 1,
            logits_soft_cap=softcap,
            q_data_type=queries.dtype,
            kv_data_type=cache.keys.dtype,
        )
        return wrapper

    planned = metadata.once(f"flashinfer {num_heads} {scale} {window} {softcap}", plan)
    attended: Tensor = planned.run(queries.contiguous(), (cache.keys, cache.values))
    return attended


@cache
def _workspace(device: torch.device) -> Tensor:
    return torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)


def _pages(metadata: AttentionMetadata) -> tuple[Tensor, Tensor, Tensor]:
    """Where the pages of each sequence begin, on the host; the pages of all, on the device; and the
    tokens in the last of each, on the host."""
    size, width = metadata.block_size, metadata.block_tables.shape[1]
    counts = [-(-context // size) for context in metadata.context_lengths]
    places = [row * width + page for row, count in enumerate(counts) for page in range(count)]
    pages = metadata.block_tables.flatten().index_select(
        0, torch.tensor(places, device=metadata.block_tables.device)
    )
    # Of a sequence without pages it is none: a library counts last ones even of those.
    lasts = [
        context - size * max(count - 1, 0)
        for context, count in zip(metadata.context_lengths, counts, strict=True)
    ]
    return (
        torch.tensor([0, *accumulate(counts)], dtype=torch.int32),
        pages,
        torch.tensor(lasts, dtype=torch.int32),
    )
