"""What every model family is to the engine, and what its decoders have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from services.engine.core.batch import ForwardBatch
from services.engine.core.kernels import AdapterParts, Matrix
from services.engine.core.kernels.cpu.program import ProgramBuilder
from services.engine.core.kernels.sampling import cap_logits
from services.engine.core.kv_cache import KVCache
from services.engine.core.layers import (
    Embedding,
    LayerNorm,
    Linear,
    MergedLinear,
    RMSNorm,
    RotaryEmbedding,
    StepContext,
)
from services.engine.core.layers.adapters import ModelAdapters, PlacedAdapter
from services.engine.core.layers.attention import AttentionBreaks
from services.engine.core.model_config import ModelConfig


class Model(nn.Module):
    """A decoder that computes one engine step: `model(batch, kv_cache)`.

    A family says what its layers are and, where they differ, how tokens are embedded and what its
    final norm is. A layer takes (hidden [num_tokens, hidden_size], StepContext) and returns the
    residual stream after it, or leaves its last addition to the context (`StepContext.add_next`).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        context = config.max_context_tokens
        self.rotary = RotaryEmbedding(config.rope, context) if config.rope is not None else None
        self.local_rotary = (
            RotaryEmbedding(config.local_rope, context)
            if config.local_rope is not None
            else self.rotary
        )
        self.embedding = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(self.make_layer(index) for index in range(config.num_layers))
        self.norm = self.make_norm()
        # A tied model has no head of its own: the embedding serves as one.
        self.head: Linear | None = None
        if not config.tie_embeddings:
            self.head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.adapters: ModelAdapters | None = None  # None: it takes none
        self.breaks: AttentionBreaks | None = None  # while it is captured in pieces
        # Where logits go, [rows, vocab_size] float32, if each step's may overwrite the last one's.
        self.logits_memory: Tensor | None = None

    def __call__(self, batch: ForwardBatch, kv_cache: KVCache) -> Tensor:
        """Compute a step's tokens, write their keys and values to the cache, and return logits.

        Returns float32 [num_rows, vocab_size], one row per entry of `batch.logits_rows`.
        """
        logits: Tensor = super().__call__(batch, kv_cache)
        return logits

    def projections(self) -> dict[str, Linear | MergedLinear]:
        """Those of its attention and its feed-forward layers, by their paths."""
        return {
            path: module
            for path, module in self.layers.named_modules(prefix="layers")
            if isinstance(module, Linear | MergedLinear) and not path.endswith(".router")
        }

    def take_adapters(self, *, max_adapters: int, max_rank: int) -> None:
        """Make room for so many adapters at a time. Before steps are captured: what they read of
        adapters stays where it is."""
        projections = self.projections()
        self.adapters = ModelAdapters(
            {
                path: len(module.sizes) if isinstance(module, MergedLinear) else 1
                for path, module in projections.items()
            },
            max_adapters=max_adapters,
            max_rank=max_rank,
            device=next(self.layers.parameters()).device,
        )
        for path, module in projections.items():
            module.adapters = self.adapters.at[path]

    def prepare_adapter(self, parts: AdapterParts) -> PlacedAdapter:
        """Return an adapter as `set_adapter` takes it.

        May be done beside steps. Raises torch.OutOfMemoryError where the device has not the room.
        """
        return PlacedAdapter(parts, next(self.layers.parameters()))

    def set_adapter(self, slot: int, adapter: PlacedAdapter | None) -> None:
        """Keep an adapter under a number by which batches name it; None: forget it."""
        assert self.adapters is not None, "it takes adapters"
        self.adapters.set(slot, adapter)

    def matrices(self) -> Iterator[Matrix]:
        """What projections multiply by, that which gives logits included."""
        for module in self.modules():
            if isinstance(module, Linear | MergedLinear):
                yield module.weight
        if self.head is None:
            yield self.embedding.weight

    @abstractmethod
    def make_layer(self, layer_index: int) -> nn.Module:
        """Return a layer, its weights unset."""

    @abstractmethod
    def make_norm(self) -> RMSNorm | LayerNorm:
        """Return the norm before the head."""

    def embed(self, batch: ForwardBatch) -> Tensor:
        """Return what the first layer sees, [num_tokens, hidden_size]."""
        embedded: Tensor = self.embedding(batch.token_ids)
        scale = self.config.embedding_scale
        # As a number of the weights' precision: so it was trained.
        return embedded if scale == 1.0 else embedded * torch.tensor(scale, dtype=embedded.dtype)

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch, kv_cache: KVCache) -> Tensor:
        """Implement `__call__`."""
        hidden, step = self._through_layers(self.embed(batch), batch, kv_cache)
        return self._logits_of(step.normed_rows(self.norm, hidden))

    def advance(self, hidden: Tensor, batch: ForwardBatch, kv_cache: KVCache) -> Tensor:
        """Take the residual stream, [num_tokens, hidden_size], through the layers."""
        hidden, step = self._through_layers(hidden, batch, kv_cache)
        return step.settled(hidden)

    def logits(self, hidden: Tensor, batch: ForwardBatch) -> Tensor:
        """What `__call__` returns, of the residual stream after the last layer."""
        return self._logits_of(self.norm.of_rows(hidden, batch.logits_rows))

    def _through_layers(
        self, hidden: Tensor, batch: ForwardBatch, kv_cache: KVCache
    ) -> tuple[Tensor, StepContext]:
        """The residual stream behind the layers, but for what the last one leaves to be added."""
        if self.adapters is not None:
            self.adapters.begin(batch)
        step = StepContext(batch, kv_cache, hidden.dtype, self.breaks)
        for layer in self.layers:
            hidden = layer(hidden, step)
        return hidden, step

    def _logits_of(self, rows: Tensor) -> Tensor:
        head: Any = self.embedding.project if self.head is None else self.head
        projected: Tensor = head(rows)
        memory, cap = self.logits_memory, self.config.logit_softcap
        has_room = memory is not None and len(projected) <= len(memory)
        if cap is None:
            if memory is None or not has_room:
                return projected.float()
            return memory[: len(projected)].copy_(projected)
        if memory is not None and has_room:
            logits = memory[: len(projected)]
        elif projected.dtype == torch.float32:
            logits = projected
        else:
            logits = torch.empty_like(projected, dtype=torch.float32)
        cap_logits(projected, cap, logits)
        return logits

    def rotary_of(self, layer_index: int) -> RotaryEmbedding | None:
        """The positions of a layer: those with a window may have their own."""
        windowed = self.config.window(layer_index) is not None
        return self.local_rotary if windowed else self.rotary

    @abstractmethod
    def lower(self, program: ProgramBuilder) -> None:
        """Append this model's step to a program of the native CPU kernels.

        Raises ValueError for a shape that they do not serve: it runs on plain torch.
        """
