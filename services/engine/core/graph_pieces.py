"""A model's layers captured in pieces, between which attention is computed as it is.

What a layer does to each token by itself is the same whatever the lengths of sequences: of a step
that computes prompts it can be captured by the number of tokens alone. Attention cannot: how it is
divided among the processors of a GPU hangs on these lengths.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

from torch import Tensor

from services.engine.core.batch import ForwardBatch
from services.engine.core.layers.attention import PagedAttention, StepContext

Replay: TypeAlias = Callable[[], None]
# Computes, and calls what it is given wherever a piece ends and the next begins.
ComputePieces: TypeAlias = Callable[[Callable[[], None]], Tensor]


class PieceRecorder(Protocol):
    """Captures what a device is told to compute, in pieces."""

    def record_pieces(self, compute: ComputePieces) -> tuple[list[Replay], Tensor]:
        """Return what computes each piece anew, and where the last leaves its result.

        `compute` is called twice, the first time to do what is done once. Raises RuntimeError for
        what cannot be captured.
        """


class BreakMemory:
    """Where pieces leave queries and find what attention makes of them: of all layers and steps,
    since each is read before the next is written."""

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._queries: Tensor | None = None
        self._attended: Tensor | None = None

    def of(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """The places of so many queries like these, and of what is made of them."""
        if self._queries is None or self._attended is None:
            self._queries = queries.new_zeros((self._max_tokens, *queries.shape[1:]))
            self._attended = self._queries.clone().flatten(1)
        count = len(queries)
        return self._queries[:count], self._attended[:count]


class LayerPieces:
    """The layers of a model for steps of so many tokens, those that pad them included."""

    def __init__(
        self,
        model: Any,
        recorder: PieceRecorder,
        memory: BreakMemory,
        batch: ForwardBatch,
        kv_cache: Any,
    ) -> None:
        """model: a Model of `models`. batch: a step whose token ids, positions and slots lie where
        those of all steps of its size will. Raises RuntimeError for what cannot be captured."""
        self._model = model
        self._memory = memory
        self._recorded: list[PagedAttention] = []
        self._cut: Callable[[], None] = _nothing
        self._queries: Tensor | None = None

        def compute(cut: Callable[[], None]) -> Tensor:
            self._cut, self._recorded = cut, []
            model.breaks = self
            try:
                hidden: Tensor = model.advance(model.embed(batch), batch, kv_cache)
            finally:
                model.breaks = None
            return hidden

        self._pieces, self._hidden = recorder.record_pieces(compute)
        self._attentions = tuple(self._recorded)

    def at(self, attention: PagedAttention, queries: Tensor) -> Tensor:
        """As AttentionBreaks."""
        self._queries, attended = self._memory.of(queries)
        self._queries.copy_(queries)
        self._cut()
        self._recorded.append(attention)
        return attended

    def logits(self, batch: ForwardBatch, kv_cache: Any) -> Tensor:
        """What the model returns for a step that is padded to this size."""
        assert self._queries is not None, "there is a layer at least"
        _, attended = self._memory.of(self._queries)
        step = StepContext(batch, kv_cache, attended.dtype)
        # Padding belongs to no sequence: whatever it attends to is its own.
        count = sum(batch.query_lengths)
        for replay, attention in zip(self._pieces, self._attentions, strict=False):
            replay()
            attended[:count].copy_(attention(self._queries[:count], step))
        self._pieces[-1]()
        logits: Tensor = self._model.logits(self._hidden, batch)
        return logits


def _nothing() -> None:
    return None
