"""Steps over a paged cache whose blocks lie in any order, for attention on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from services.engine.core.kernels import AttentionMetadata, KVLayer, paged_attention
from services.engine.core.kernels.attention import DeviceLengths
from services.engine.core.kernels.kv_layer import quantize_heads


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a model's attention and its cache. dtype: of queries; kv_dtype: of the cache."""

    heads: int
    kv_heads: int
    head_dim: int
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    kv_dtype: torch.dtype = torch.float32

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5


@dataclass(frozen=True, slots=True)
class Pattern:
    """What a query sees, and how scores are bent; see `paged_attention`."""

    window: int | None = None
    global_tokens: int = 0
    softcap: float | None = None


@dataclass(frozen=True, slots=True)
class PagedStep:
    """A step of sequences, each (new tokens, tokens before them), and what is in the cache."""

    shape: Shape
    queries: Tensor
    cache: KVLayer
    metadata: AttentionMetadata

    @classmethod
    def random(
        cls, shape: Shape, sequences: Sequence[tuple[int, int]], device: str = "cpu"
    ) -> PagedStep:
        """Random numbers everywhere, in blocks that belong to nobody too: the first two and the
        last."""
        contexts = tuple(new + past for new, past in sequences)
        counts = [-(-context // shape.block_size) for context in contexts]
        order = (torch.randperm(sum(counts)) + 2).tolist()
        tables = torch.zeros(len(sequences), max(counts) + 1, dtype=torch.int32)
        for row, count in enumerate(counts):
            tables[row, :count] = torch.tensor([order.pop() for _ in range(count)])
        blocks = (sum(counts) + 3, shape.block_size)
        stored = [_stored(shape, blocks, device) for _ in range(2)]
        cache = KVLayer(*(each[0] for each in stored), *(each[1] for each in stored))
        num_tokens = sum(new for new, _ in sequences)
        # As projections leave them: beside keys and values.
        queries = torch.randn(num_tokens, shape.heads + 2, shape.head_dim, device=device)
        lengths = tuple(new for new, _ in sequences)
        metadata = AttentionMetadata(lengths, contexts, tables.to(device), shape.block_size)
        return cls(shape, queries.to(shape.dtype)[:, : shape.heads], cache, metadata)

    def bounded(self, most_queries: int, most_context: int) -> PagedStep:
        """The same as a captured step runs it: the host knows bounds."""
        exact, number = self.metadata, self.metadata.num_sequences
        metadata = AttentionMetadata(
            (most_queries,) * number,
            (most_context,) * number,
            exact.block_tables,
            exact.block_size,
            DeviceLengths(exact.device_lengths.query_starts, exact.device_lengths.contexts),
            are_bounds=True,
        )
        return replace(self, metadata=metadata)

    def exact(self, pattern: Pattern) -> Tensor:
        """Attention in float32 of what the cache holds."""
        keys = _floats(self.cache.keys, self.cache.key_scales)
        values = _floats(self.cache.values, self.cache.value_scales)
        return paged_attention.reference(
            self.queries.float(),
            KVLayer(keys, values),
            self.metadata,
            self.shape.scale,
            pattern.window,
            pattern.softcap,
            pattern.global_tokens,
        )

    def poisoned(self, pattern: Pattern) -> PagedStep:
        """The same where blocks hold no numbers of which no query sees a token, and tables end in
        such blocks."""
        metadata = self.metadata
        size, tables = metadata.block_size, metadata.block_tables.clone()
        seen: set[int] = set()
        for row, (new, context) in enumerate(
            zip(metadata.query_lengths, metadata.context_lengths, strict=True)
        ):
            first = 0 if pattern.window is None else max(0, context - new - pattern.window + 1)
            for column in range(tables.shape[1]):
                begin, end = column * size, (column + 1) * size
                in_window = begin < context and end > first
                if in_window or (begin < pattern.global_tokens and begin < context):
                    seen.add(int(tables[row, column]))
                else:
                    tables[row, column] = 0
        unseen = [block for block in range(len(self.cache.keys)) if block not in seen]
        cache = KVLayer(
            *(_with_nan(each, unseen) for each in (self.cache.keys, self.cache.values)),
            *(
                None if each is None else _with_nan(each, unseen)
                for each in (self.cache.key_scales, self.cache.value_scales)
            ),
        )
        return replace(self, cache=cache, metadata=replace(metadata, block_tables=tables))

    def attended(self, run: Callable[..., Tensor], pattern: Pattern) -> Tensor:
        """By a form of `paged_attention`."""
        return run(
            self.queries,
            self.cache,
            self.metadata,
            self.shape.scale,
            pattern.window,
            pattern.softcap,
            pattern.global_tokens,
        )


def _stored(shape: Shape, blocks: tuple[int, int], device: str) -> tuple[Tensor, Tensor | None]:
    heads = torch.randn(blocks[0] * blocks[1], shape.kv_heads, shape.head_dim, device=device)
    elements, scales = quantize_heads(heads, shape.kv_dtype)
    elements = elements.to(shape.kv_dtype).view(*blocks, shape.kv_heads, shape.head_dim)
    return elements, None if scales is None else scales.view(*blocks, shape.kv_heads)


def _floats(stored: Tensor, scales: Tensor | None) -> Tensor:
    return stored.float() if scales is None else stored.float() * scales.unsqueeze(-1)


def _with_nan(stored: Tensor, blocks: list[int]) -> Tensor:
    poisoned = stored.clone()
    if stored.dtype == torch.float8_e4m3fn:
        poisoned.view(torch.uint8)[blocks] = 0x7F
    elif stored.dtype != torch.int8:
        poisoned[blocks] = float("nan")
    return poisoned
