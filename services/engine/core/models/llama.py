"""The Llama family: Llama 2 and 3, SmolLM2, and whatever else shares their architecture.

Touvron et al., arXiv:2307.09288; Grattafiori et al., arXiv:2407.21783.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from services.engine.core.batch import ForwardBatch
from services.engine.core.kernels import AttentionMetadata, rotary_embedding, silu_and_mul
from services.engine.core.kernels.cpu.program import Buffer, Epilogue, ProgramBuilder
from services.engine.core.kv_cache import KVCache
from services.engine.core.layers import (
    Embedding,
    Linear,
    MergedLinear,
    PagedAttention,
    RMSNorm,
    RotaryEmbedding,
)
from services.engine.core.models.base import Model
from services.engine.core.models.config import ModelConfig


class LlamaAttention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: ModelConfig, layer_index: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        query_size = config.heads * config.head_dim
        kv_size = config.kv_heads * config.head_dim
        sizes = {"q": query_size, "k": kv_size, "v": kv_size}
        self.qkv = MergedLinear(config.hidden_size, sizes, bias=config.qkv_bias)
        self.output = Linear(query_size, config.hidden_size, bias=config.output_bias)
        self.attend = PagedAttention(layer_index, config.head_dim)

    def forward(self, hidden: Tensor, kv_cache: KVCache, step: _Step) -> Tensor:
        # [num_tokens, heads + 2 * kv_heads, head_dim]; queries and keys are rotated in one go.
        heads: Tensor = self.qkv(hidden).view(hidden.shape[0], -1, self.head_dim)
        rotated = self.heads + self.kv_heads
        queries_keys = rotary_embedding(heads[:, :rotated], step.cos, step.sin)
        attended = self.attend(
            queries_keys[:, : self.heads],
            queries_keys[:, self.heads :],
            heads[:, rotated:],
            kv_cache,
            step.slots,
            step.attention,
        )
        projected: Tensor = self.output(attended)
        return projected


class LlamaFeedForward(nn.Module):
    """The SwiGLU feed-forward layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        sizes = {"gate": config.intermediate_size, "up": config.intermediate_size}
        self.gate_up = MergedLinear(config.hidden_size, sizes, bias=config.mlp_bias)
        self.down = Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, hidden: Tensor) -> Tensor:
        projected: Tensor = self.down(silu_and_mul(self.gate_up(hidden)))
        return projected


class LlamaLayer(nn.Module):
    """Attention and feed-forward, each behind a norm, both adding to the residual stream."""

    def __init__(self, config: ModelConfig, layer_index: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = LlamaAttention(config, layer_index)
        self.feed_forward_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.feed_forward = LlamaFeedForward(config)

    def forward(
        self, hidden: Tensor, residual: Tensor | None, kv_cache: KVCache, step: _Step
    ) -> tuple[Tensor, Tensor]:
        """Return (what to add to the residual stream next, the stream so far)."""
        if residual is None:
            residual = hidden
            hidden = self.attention_norm(hidden)
        else:
            hidden, residual = self.attention_norm.add(hidden, residual)
        hidden = self.attention(hidden, kv_cache, step)
        hidden, residual = self.feed_forward_norm.add(hidden, residual)
        return self.feed_forward(hidden), residual

    def lower(self, program: ProgramBuilder, *, is_last: bool) -> None:
        """The same as operations of the native kernels, on the residual stream."""
        attention, feed_forward = self.attention, self.feed_forward
        index = attention.attend.layer_index
        program.norm(self.attention_norm)
        program.linear(attention.qkv, Buffer.PROJECTED)
        program.rotary_kv(index)
        program.attention(index, attention.heads * attention.head_dim)
        if is_last:
            # Later steps read its keys and values, of all tokens; nobody reads the rest.
            program.select_rows()
        program.convert(Buffer.ATTENDED)
        program.linear(attention.output, Buffer.RESIDUAL, epilogue=Epilogue.ADD)
        program.norm(self.feed_forward_norm)
        program.linear(feed_forward.gate_up, Buffer.GATED, epilogue=Epilogue.GATED_SILU)
        program.convert(Buffer.GATED)
        program.linear(feed_forward.down, Buffer.RESIDUAL, epilogue=Epilogue.ADD)


class Llama(Model):
    """A Llama-family decoder."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.embedding = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LlamaLayer(config, index) for index in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        # A tied model has no head of its own: the embedding serves as one.
        self.head: Linear | None = None
        if not config.tie_embeddings:
            self.head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.rotary = RotaryEmbedding(config.rope, config.max_context_tokens)

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch, kv_cache: KVCache) -> Tensor:
        hidden: Tensor = self.embedding(batch.token_ids)
        step = _Step(self.rotary, batch, kv_cache, hidden.dtype)
        residual: Tensor | None = None
        for layer in self.layers:
            hidden, residual = layer(hidden, residual, kv_cache, step)
        assert residual is not None
        rows = batch.logits_rows
        hidden, _ = self.norm.add(hidden.index_select(0, rows), residual.index_select(0, rows))
        logits: Tensor = self.embedding.project(hidden) if self.head is None else self.head(hidden)
        return logits.float()

    def lower(self, program: ProgramBuilder) -> None:
        program.embed(self.embedding)
        for layer in self.layers:
            assert isinstance(layer, LlamaLayer)
            layer.lower(program, is_last=layer is self.layers[-1])
        program.norm(self.norm)
        program.linear(self.embedding if self.head is None else self.head, Buffer.LOGITS)


class _Step:
    """What all layers of a step share, computed once."""

    def __init__(
        self, rotary: RotaryEmbedding, batch: ForwardBatch, kv_cache: KVCache, dtype: torch.dtype
    ) -> None:
        self.cos, self.sin = rotary.angles(batch.positions, dtype)
        self.slots = batch.slots
        self.attention = AttentionMetadata(
            batch.query_lengths, batch.context_lengths, batch.block_tables, kv_cache.block_size
        )
