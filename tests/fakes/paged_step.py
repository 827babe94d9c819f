"""A step over a packed KV cache, its caches filled natively, for tests of the native attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from services.engine.core.kernels import AttentionMetadata, KVLayer, paged_attention
from services.engine.core.kernels.cpu import library
from services.engine.core.kernels.cpu.attention import Step, attention, rotary_kv
from services.engine.core.kernels.cpu.kv_cache import KvFormat, PackedKVCache
from services.engine.core.kernels.cpu.library import Library
from services.engine.core.kernels.cpu.team import Team

NAN_BYTE = 0xFF  # a bf16, an int8 scale or a float made of these bytes is NaN


def libraries() -> list[Library]:
    """Return the kernels of every instruction set that this machine has."""
    try:
        path = library.find_or_build()
    except library.UnavailableError:
        return []
    return [library.load(path, name) for name in library.isa_names(path)]


@dataclass(frozen=True)
class Shape:
    """Attention's sizes; `heads` is a multiple of `kv_heads`."""

    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 32
    block_size: int = 16
    window: int | None = None
    softcap: float | None = None

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5


@dataclass(frozen=True)
class Text:
    """What one sequence's tokens project to: [length, heads * head_dim] and the like, float32."""

    queries: Tensor
    keys: Tensor
    values: Tensor

    @classmethod
    def random(cls, shape: Shape, length: int, seed: int) -> Text:
        generator = torch.Generator().manual_seed(seed)

        def rows(heads: int) -> Tensor:
            return torch.randn(length, heads * shape.head_dim, generator=generator)

        return cls(rows(shape.heads), rows(shape.kv_heads), rows(shape.kv_heads))


class Pool:
    """A cache of one layer that starts as NaN, and a native kernel that reads and writes it."""

    def __init__(
        self,
        kernels: Library,
        shape: Shape,
        num_blocks: int,
        kv_format: KvFormat = KvFormat.BF16,
        threads: int = 2,
        seed: int = 0,
    ) -> None:
        self.kernels, self.shape, self.team = kernels, shape, Team(kernels, threads)
        self.cache = PackedKVCache(
            1, num_blocks, shape.block_size, shape.kv_heads, shape.head_dim, kv_format
        )
        self.cache.fill(NAN_BYTE)
        generator = torch.Generator().manual_seed(seed)
        self._free = torch.randperm(num_blocks, generator=generator).tolist()

    def take(self, num_tokens: int) -> list[int]:
        """Return blocks for so many tokens, scattered over the pool."""
        return [self._free.pop() for _ in range(-(-num_tokens // self.shape.block_size))]

    def step(
        self, blocks: Sequence[list[int]], queries: Sequence[int], contexts: Sequence[int]
    ) -> Step:
        """Return a step of sequences in these blocks; unused table entries name no block."""
        table = torch.full((len(blocks), max(map(len, blocks)) + 1), 2**31 - 1)
        for row, own in zip(table, blocks, strict=True):
            row[: len(own)] = torch.tensor(own)
        return Step.of(queries, contexts, table, self.shape.block_size)

    def write(self, step: Step, texts: Sequence[Text]) -> None:
        """Write the keys and values of the step's tokens."""
        rows = self._rows(step, texts)
        qkv = torch.cat([torch.cat((t.queries, t.keys, t.values), 1)[r] for t, r in rows])
        unrotated = torch.ones(int(step.positions.max()) + 1, self.shape.head_dim // 2)
        zeros = torch.zeros_like(unrotated)
        rotary_kv(self.team, step, self.cache, [0], qkv, self.shape.heads, unrotated, zeros)

    def attend(self, step: Step, texts: Sequence[Text]) -> Tensor:
        """Return the native attention of the step's queries, [num_tokens, heads * head_dim]."""
        queries = torch.cat([text.queries[rows] for text, rows in self._rows(step, texts)])
        output = torch.full_like(queries, float("nan"))
        shape = self.shape
        attention(
            self.team,
            step,
            self.cache,
            [0],
            queries,
            shape.heads,
            shape.scale,
            output,
            shape.window,
            shape.softcap,
        )
        return output

    def run(
        self,
        blocks: Sequence[list[int]],
        queries: Sequence[int],
        contexts: Sequence[int],
        texts: Sequence[Text],
    ) -> Tensor:
        """Write a step's tokens and attend, as an engine does."""
        step = self.step(blocks, queries, contexts)
        self.write(step, texts)
        return self.attend(step, texts)

    def _rows(self, step: Step, texts: Sequence[Text]) -> list[tuple[Text, Tensor]]:
        starts = step.query_starts.tolist()
        return [
            (text, step.positions[begin:end].long())
            for text, begin, end in zip(texts, starts[:-1], starts[1:], strict=True)
        ]


def reference(pool: Pool, step: Step, texts: Sequence[Text]) -> Tensor:
    """Return plain-torch attention in float64 over what the cache holds of the step's sequences."""
    shape, cache = pool.shape, pool.cache
    contexts = step.context_lengths.tolist()
    lengths = step.query_starts.diff().tolist()
    paged = torch.zeros(
        2, cache.num_blocks, shape.block_size, shape.kv_heads, shape.head_dim, dtype=torch.float64
    )
    tables = torch.zeros_like(step.block_tables)
    for row, table, context in zip(tables, step.block_tables, contexts, strict=True):
        used = -(-context // shape.block_size)
        row[:used] = table[:used]
        positions = torch.arange(context)
        slots = table.long()[positions // shape.block_size] * shape.block_size
        slots += positions % shape.block_size
        paged.flatten(1, 2)[:, slots] = torch.stack(cache.read(0, slots)).double()
    queries = torch.cat([text.queries[rows] for text, rows in pool._rows(step, texts)])
    if pool.kernels.isa in ("amx", "avx512bf16"):  # the others multiply floats
        queries = queries.bfloat16().double()
    metadata = AttentionMetadata(tuple(lengths), tuple(contexts), tables, shape.block_size)
    heads = queries.double().view(len(queries), shape.heads, shape.head_dim)
    return paged_attention(
        heads, KVLayer(paged[0], paged[1]), metadata, shape.scale, shape.window, shape.softcap
    ).flatten(1)
