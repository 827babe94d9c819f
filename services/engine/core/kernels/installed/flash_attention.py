"""Attention by FlashAttention-3 (Shah et al., arXiv:2407.08608), where it is installed.

FlashAttention-2 is not served: its pages have 256 tokens at least, our blocks fewer.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor

from services.engine.core.kernels.attention import AttentionMetadata, paged_attention
from services.engine.core.kernels.kv_layer import KVLayer

_MODULE = "flash_attn_interface"
_WIDEST_HEAD = 256


def _why_not() -> str | None:
    if importlib.util.find_spec(_MODULE) is None:
        return "FlashAttention-3 is not installed"
    if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9:
        return "FlashAttention-3 is for Hopper"
    return None


@paged_attention.implementation("cuda", name="flash-attention-3", unavailable=_why_not)
def paged_attention_flash(
    queries: Tensor,
    cache: KVLayer,
    metadata: AttentionMetadata,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    global_tokens: int = 0,
) -> Tensor:
    """See the op. Caches of eight bits and windows beside global tokens are the reference's."""
    if (
        queries.dtype not in (torch.bfloat16, torch.float16)
        or cache.keys.dtype != queries.dtype
        or queries.shape[-1] > _WIDEST_HEAD
        or (global_tokens and window is not None)
    ):
        return paged_attention.reference(
            queries, cache, metadata, scale, window, softcap, global_tokens
        )
    lengths = metadata.device_lengths
    flash: Any = importlib.import_module(_MODULE)
    attended: Tensor = flash.flash_attn_with_kvcache(
        queries,
        cache.keys,
        cache.values,
        cache_seqlens=lengths.contexts,
        page_table=metadata.block_tables,
        cu_seqlens_q=lengths.query_starts,
        max_seqlen_q=metadata.max_query_length,
        softmax_scale=scale,
        causal=True,
        # How far back and ahead a query sees beside itself; -1: all.
        window_size=(-1 if window is None else window - 1, -1 if window is None else 0),
        softcap=softcap or 0.0,
    )
    return attended
