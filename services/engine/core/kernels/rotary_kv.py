"""What lies between the projection of queries, keys and values and attention, as one op."""

from __future__ import annotations

import torch
from torch import Tensor

from services.engine.core.kernels.attention import write_kv
from services.engine.core.kernels.kv_layer import KVLayer
from services.engine.core.kernels.normalization import rms_norm
from services.engine.core.kernels.registry import declare
from services.engine.core.kernels.rotary import rotary_embedding


@declare
def rotary_kv(
    qkv: Tensor,
    cache: KVLayer,
    slots: Tensor,
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
    angles: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """Norm queries and keys, rotate them, and store keys and values in the cache.

    qkv: [num_tokens, (heads + 2 * kv_heads) * head_dim], queries before keys before values; slots:
    [num_tokens] int64, as `write_kv` takes them; norms: the weights, [head_dim], of the RMSNorm
    over each head of the queries and of the keys (Henry et al., arXiv:2010.04245); eps: theirs;
    angles: cosines and sines as `rotary_embedding` takes them. Returns the queries, [num_tokens,
    heads, head_dim], which may be a part of `qkv`.
    """
    kv_heads, head_dim = cache.keys.shape[2:]
    num_heads = qkv.shape[1] // head_dim
    heads = num_heads - 2 * kv_heads
    all_heads = qkv.view(len(qkv), num_heads, head_dim)
    # Queries and keys are rotated in one go.
    queries_keys, values = all_heads[:, :-kv_heads], all_heads[:, -kv_heads:]
    if norms is not None:
        queries, keys = queries_keys[:, :heads], queries_keys[:, heads:]
        queries_keys = torch.cat(
            (rms_norm(queries, norms[0], eps), rms_norm(keys, norms[1], eps)), dim=1
        )
    if angles is not None:
        queries_keys = rotary_embedding(queries_keys, *angles)
    write_kv(queries_keys[:, heads:], values, cache, slots)
    return queries_keys[:, :heads]
