"""Shared building blocks of encoders."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from services.engine.core.encoding.batch import EncoderBatch
from services.engine.core.kernels.encoder_attention import encoder_attention
from services.engine.core.layers import Embedding, Linear, MergedLinear

_tanh_gelu = partial(functional.gelu, approximate="tanh")
# By the names of HF's configurations.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "gelu_new": _tanh_gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
    "gelu_fast": _tanh_gelu,
    "relu": functional.relu,
    "silu": functional.silu,
    "tanh": torch.tanh,
    "linear": lambda hidden: hidden,
}


class LayerNorm(nn.Module):
    """Normalise [num_tokens, size] to mean 0 and variance 1 (Ba et al., arXiv:1607.06450)."""

    def __init__(self, size: int, eps: float, *, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.bias = nn.Parameter(torch.empty(size)) if bias else None
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        return functional.layer_norm(hidden, self.weight.shape, self.weight, self.bias, self.eps)


class FeedForward(nn.Module):
    """Two projections with an activation between them."""

    def __init__(self, size: int, intermediate_size: int, activation: str) -> None:
        super().__init__()
        self.up = Linear(size, intermediate_size, bias=True)
        self.down = Linear(intermediate_size, size, bias=True)
        self.activation = activation

    def forward(self, hidden: Tensor) -> Tensor:
        projected: Tensor = self.down(ACTIVATIONS[self.activation](self.up(hidden)))
        return projected


class Attention(nn.Module):
    """Every token of a sequence attends to all of them."""

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, size // heads
        self.qkv = MergedLinear(size, {"q": size, "k": size, "v": size}, bias=True)
        self.output = Linear(size, size, bias=True)

    def forward(self, hidden: Tensor, batch: EncoderBatch) -> Tensor:
        queries, keys, values = self.qkv(hidden).view(-1, 3, self.heads, self.head_dim).unbind(1)
        attended = encoder_attention(queries, keys, values, batch.groups, self.head_dim**-0.5)
        projected: Tensor = self.output(attended.flatten(1))
        return projected


class PostNormLayer(nn.Module):
    """Attention and feed-forward, each added to its input and normalised afterwards."""

    def __init__(
        self, attention: nn.Module, size: int, intermediate_size: int, activation: str, eps: float
    ) -> None:
        super().__init__()
        self.attention = attention
        self.attention_norm = LayerNorm(size, eps)
        self.feed_forward = FeedForward(size, intermediate_size, activation)
        self.feed_forward_norm = LayerNorm(size, eps)

    def forward(self, hidden: Tensor, step: Any) -> Tensor:
        """`step` is what the attention takes beside the rows."""
        hidden = self.attention_norm(hidden + self.attention(hidden, step))
        normed: Tensor = self.feed_forward_norm(hidden + self.feed_forward(hidden))
        return normed


class InputEmbeddings(nn.Module):
    """The sum of what tokens, positions and token types say, normalised.

    `positions` or `token_types` of 0: there is no such table. `first_position` is the row of a
    sequence's first token.
    """

    def __init__(
        self,
        vocab_size: int,
        size: int,
        eps: float,
        *,
        positions: int,
        token_types: int,
        first_position: int = 0,
    ) -> None:
        super().__init__()
        self.word = Embedding(vocab_size, size)
        self.position = Embedding(positions, size) if positions else None
        self.token_type = Embedding(token_types, size) if token_types else None
        self.norm = LayerNorm(size, eps)
        self.first_position = first_position

    def forward(self, batch: EncoderBatch) -> Tensor:
        hidden: Tensor = self.word(batch.token_ids)
        if self.position is not None:
            hidden = hidden + self.position(batch.positions + self.first_position)
        if self.token_type is not None:
            # A model with one type gives it to both texts of a pair.
            types = batch.token_types.clamp(max=len(self.token_type.weight) - 1)
            hidden = hidden + self.token_type(types)
        normed: Tensor = self.norm(hidden)
        return normed
