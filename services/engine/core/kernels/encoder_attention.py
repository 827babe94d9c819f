"""Attention of encoders: within a sequence everything sees everything, or its neighbourhood."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from services.engine.core.kernels.registry import declare


class EqualLengths(Protocol):
    """Sequences of one length in a flattened batch, as `encoding.batch` groups them."""

    @property
    def length(self) -> int:
        """Tokens of each."""

    @property
    def rows(self) -> Tensor | None:
        """Their rows, [num_sequences * length]; None: all."""


@declare
def encoder_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    groups: Sequence[EqualLengths],
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Attention of each token over all tokens of its sequence.

    queries, keys, values: [num_tokens, heads, head_dim], flattened over sequences. With `window`,
    over those at most so many tokens away. Returns [num_tokens, heads, head_dim].
    """
    output = torch.empty_like(queries)
    for group in groups:
        mask = _window_mask(group.length, window, queries)
        attended = functional.scaled_dot_product_attention(
            _by_sequence(queries, group),
            _by_sequence(keys, group),
            _by_sequence(values, group),
            attn_mask=mask,
            scale=scale,
        )
        flattened = attended.transpose(1, 2).flatten(0, 1)
        if group.rows is None:
            return flattened
        output.index_copy_(0, group.rows, flattened)
    return output


def _by_sequence(heads: Tensor, group: EqualLengths) -> Tensor:
    """[num_sequences, heads, length, head_dim]"""
    rows = heads if group.rows is None else heads.index_select(0, group.rows)
    return rows.view(-1, group.length, *heads.shape[1:]).transpose(1, 2)


def _window_mask(length: int, window: int | None, like: Tensor) -> Tensor | None:
    if window is None or length <= window + 1:
        return None
    index = torch.arange(length, device=like.device)
    return (index.view(-1, 1) - index).abs() <= window
