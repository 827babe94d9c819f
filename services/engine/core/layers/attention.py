"""Attention of one layer: projections, positions, and attention over the paged cache."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from services.engine.core.batch import ForwardBatch
from services.engine.core.kernels import (
    Activations,
    AttentionMetadata,
    paged_attention,
    rotary_kv,
)
from services.engine.core.kernels.cpu.program import Buffer, ProgramBuilder
from services.engine.core.kv_cache import KVCache
from services.engine.core.layers.linear import Linear, MergedLinear
from services.engine.core.layers.norm import LayerNorm, RMSNorm
from services.engine.core.layers.rotary import RotaryEmbedding
from services.engine.core.model_config import ModelConfig, SparseAttention


class AttentionBreaks(Protocol):
    """Where layers are captured in pieces, between which attention is computed as it is."""

    def at(self, attention: PagedAttention, queries: Tensor) -> Tensor:
        """End a piece with these queries, and begin one with what `attention` makes of them."""


class StepContext:
    """What all layers of a step share, computed once."""

    def __init__(
        self,
        batch: ForwardBatch,
        kv_cache: KVCache,
        dtype: torch.dtype,
        breaks: AttentionBreaks | None = None,
    ) -> None:
        """breaks: of a step that is being captured in pieces."""
        self.breaks = breaks
        self.batch = batch
        self.kv_cache = kv_cache
        several = batch.block_tables.dim() > 2
        # Of each group of layers: where keys and values go, and where those of all tokens are.
        self._slots = tuple(batch.slots) if several else (batch.slots,)
        self._metadata = tuple(
            AttentionMetadata(
                batch.query_lengths,
                batch.context_lengths,
                tables,
                kv_cache.block_size,
                batch.lengths,
                batch.are_bounds,
                # A step begins with transfers and with kernels that let none begin early: what
                # earlier steps wrote, and these, is there before any other kernel is.
                is_settled=True,
            )
            for tables in (batch.block_tables if several else (batch.block_tables,))
        )
        self._dtype = dtype
        self._angles: dict[int, tuple[Tensor, Tensor]] = {}
        # What the last layer adds to the residual stream, if the next norm is to do it: one pass
        # over memory less for each layer.
        self._added: Tensor | None = None
        self._before_adding: RMSNorm | None = None

    def places(self, layer_index: int) -> tuple[Tensor, AttentionMetadata]:
        """Where a layer's keys and values go, and where those of all tokens are."""
        group = self.kv_cache.groups.group_of_layer[layer_index]
        return self._slots[group], self._metadata[group]

    def angles(self, rotary: RotaryEmbedding) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the tokens' positions, as `rotary_embedding` takes them."""
        if id(rotary) not in self._angles:
            self._angles[id(rotary)] = rotary.angles(self.batch.positions, self._dtype)
        return self._angles[id(rotary)]

    def add_next(self, added: Tensor, *, before: RMSNorm | None = None) -> None:
        """Leave it to the next `normed` or `settled` to add this to the residual stream, behind a
        norm if `before` is one."""
        self._added, self._before_adding = added, before

    def normed(
        self, norm: RMSNorm, hidden: Tensor, to: torch.dtype | None = None
    ) -> tuple[Activations, Tensor]:
        """The norm of the residual stream, and the stream, with what the last layer adds; to: as
        RMSNorm has it."""
        added, self._added = self._added, None
        if added is None:
            return norm(hidden, to), hidden
        return norm.add(added, hidden, to, before=self._before_adding)

    def normed_rows(self, norm: RMSNorm | LayerNorm, hidden: Tensor) -> Tensor:
        """The norm of the rows of the residual stream whose logits are wanted, with what the last
        layer adds."""
        rows = self.batch.logits_rows
        if isinstance(norm, LayerNorm):
            return norm.of_rows(self.settled(hidden), rows)
        added, self._added = self._added, None
        return norm.of_rows(hidden, rows, added, before=self._before_adding)

    def settled(self, hidden: Tensor) -> Tensor:
        """The residual stream with what the last layer adds."""
        added, self._added = self._added, None
        if added is None:
            return hidden
        return hidden + (added if self._before_adding is None else self._before_adding(added))


class PagedAttention(nn.Module):
    """Scaled dot-product attention over the paged cache of layer `layer_index`."""

    def __init__(self, config: ModelConfig, layer_index: int) -> None:
        super().__init__()
        self.layer_index = layer_index
        self.scale = config.scale
        seen = config.seen(layer_index)
        if isinstance(seen, SparseAttention):
            self.window: int | None = seen.window
            self.global_tokens = seen.global_tokens
        else:
            self.window, self.global_tokens = seen, 0
        self.softcap = config.attention_softcap

    def forward(self, queries: Tensor, step: StepContext) -> Tensor:
        """queries: [num_tokens, heads, head_dim], with keys and values in the cache -> [num_tokens,
        heads * head_dim]."""
        if step.breaks is not None:
            return step.breaks.at(self, queries)
        cache = step.kv_cache.layers[self.layer_index]
        _, metadata = step.places(self.layer_index)
        return paged_attention(
            queries,
            cache,
            metadata,
            self.scale,
            self.window,
            self.softcap,
            self.global_tokens,
        ).flatten(1)


class Attention(nn.Module):
    """Grouped-query attention, with rotary positions unless `rotary` is None.

    Where the model has a norm of queries and keys, it is one over each head (Henry et al.,
    arXiv:2010.04245), before they are rotated.
    """

    def __init__(
        self, config: ModelConfig, layer_index: int, rotary: RotaryEmbedding | None
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        query_size = config.heads * config.head_dim
        kv_size = config.kv_heads * config.head_dim
        sizes = {"q": query_size, "k": kv_size, "v": kv_size}
        self.qkv = MergedLinear(config.hidden_size, sizes, bias=config.qkv_bias)
        self.q_norm: RMSNorm | None = None
        self.k_norm: RMSNorm | None = None
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.norm_eps)
        self.output = Linear(query_size, config.hidden_size, bias=config.output_bias)
        self.attend = PagedAttention(config, layer_index)
        self.rotary = rotary

    @property
    def takes(self) -> torch.dtype | None:
        """The format that its input may come rounded to."""
        return self.qkv.takes

    def forward(self, hidden: Activations, step: StepContext) -> Tensor:
        """hidden: [num_tokens, hidden_size] -> the same shape."""
        index = self.attend.layer_index
        norms, eps = None, 0.0
        if self.q_norm is not None and self.k_norm is not None:
            norms, eps = (self.q_norm.weight, self.k_norm.weight), self.q_norm.eps
        queries = rotary_kv(
            self.qkv(hidden),
            step.kv_cache.layers[index],
            step.places(index)[0],
            norms,
            eps,
            None if self.rotary is None else step.angles(self.rotary),
        )
        attended = self.attend(queries, step)
        projected: Tensor = self.output(attended)
        return projected

    def lower(self, program: ProgramBuilder, *, is_last: bool) -> None:
        """The same as operations of the native kernels, up to what `output` reads."""
        index = self.attend.layer_index
        if self.attend.global_tokens:
            raise ValueError("sparse_attention has global tokens")
        program.adapted_linear(self.qkv, Buffer.PROJECTED)
        program.rotary_kv(index, self.rotary, q_norm=self.q_norm, k_norm=self.k_norm)
        program.attention(
            index,
            self.heads * self.head_dim,
            window=self.attend.window,
            softcap=self.attend.softcap,
        )
        if is_last:
            # Later steps read its keys and values, of all tokens; nobody reads the rest.
            program.select_rows()
        program.convert(Buffer.ATTENDED)
