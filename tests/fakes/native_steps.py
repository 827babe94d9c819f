"""Steps of sequences on the native kernels, driven by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from services.engine.core.batch import ForwardBatch
from services.engine.core.kernels.cpu.kv_cache import KvFormat, PackedKVCache
from services.engine.core.kernels.cpu.library import Library
from services.engine.core.kernels.cpu.team import Team
from services.engine.core.models.loader import OpenedModel, open_model
from services.engine.core.models.native import NativeModel
from services.engine.core.models.precision import WeightChoice
from tests.fakes.decoder_families import VOCAB_SIZE
from tests.fakes.paged_step import NAN_BYTE

# Steps of (name, number of tokens) that threads divide between them in many ways: one sequence that
# all compute, cut once or twice; decode; chunks behind what is cached; parts that nobody is left
# for.
MIXED_STEPS = [
    [(0, 60)],
    [(1, 1), (0, 40), (2, 23), (3, 1)],
    [(name, 1) for name in range(30)],
    [(name, 1) for name in range(24)] + [(30, 110)],
    [(31, 3), (1, 90), (32, 2)],
    [(name, 7) for name in range(33, 45)],
]


def text(length: int, seed: int = 0) -> list[int]:
    """Token ids of a small vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist()


class Sequences:
    """Steps of several sequences over a cache of stale NaN, their blocks in random order."""

    def __init__(
        self,
        kernels: Library,
        model: Path | OpenedModel,
        weights: WeightChoice = "auto",
        kv_format: KvFormat = KvFormat.BF16,
        threads: int = 1,
        seed: int = 0,
        max_context_tokens: int | None = None,
    ) -> None:
        opened = (
            model
            if isinstance(model, OpenedModel)
            else open_model(model, max_context_tokens=max_context_tokens)
        )
        self.model = NativeModel(
            opened.skeleton, opened.checkpoint, Team(kernels, threads), weights
        )
        config = opened.config
        self.cache = PackedKVCache(
            config.num_layers, 256, 16, config.kv_heads, config.head_dim, kv_format
        )
        self.cache.fill(NAN_BYTE)
        self.model.bind(self.cache, max_batch_tokens=2_048)
        generator = torch.Generator().manual_seed(seed)
        self._free = torch.randperm(256, generator=generator).tolist()
        self._tables: dict[int, list[int]] = {}
        self._lengths: dict[int, int] = {}

    def step(self, tokens: dict[int, Sequence[int]]) -> dict[int, Tensor]:
        """Append each sequence's tokens; returns the logits at all of them, [tokens, vocab]."""
        batch = self.append(tokens)
        logits = self.model(batch, self.cache).clone()
        return dict(zip(tokens, logits.split(batch.query_lengths), strict=True))

    def append(self, tokens: dict[int, Sequence[int]]) -> ForwardBatch:
        """Append each sequence's tokens; returns the step that computes the logits at all."""
        positions = []
        for name, new in tokens.items():
            begin = self._lengths.get(name, 0)
            self._lengths[name] = begin + len(new)
            table = self._tables.setdefault(name, [])
            while 16 * len(table) < begin + len(new):
                table.append(self._free.pop())
            positions += range(begin, begin + len(new))
        owners = [name for name, new in tokens.items() for _ in new]
        slots = [
            16 * self._tables[name][position // 16] + position % 16
            for name, position in zip(owners, positions, strict=True)
        ]
        widest = max(len(self._tables[name]) for name in tokens)
        tables = [self._tables[name] + [0] * (widest - len(self._tables[name])) for name in tokens]
        lengths = tuple(len(new) for new in tokens.values())
        return ForwardBatch(
            torch.tensor([token for new in tokens.values() for token in new]),
            torch.tensor(positions),
            torch.tensor(slots),
            torch.tensor(tables, dtype=torch.int32),
            lengths,
            tuple(self._lengths[name] for name in tokens),
            torch.arange(len(positions)),
        )


def in_company(sequences: Sequences, tokens: list[int], num_others: int, *, before: int) -> Tensor:
    """Logits of a sequence that comes in four chunks, beside others that grow by a few tokens: so
    many of them stand before it in a step."""
    parts = []
    for begin, end in ((0, 5), (5, 21), (21, 22), (22, len(tokens))):
        others = {name: text(7 * name % 11 + 1, begin + name) for name in range(1, num_others + 1)}
        step = dict(list(others.items())[:before]) | {0: tokens[begin:end]} | others
        parts.append(sequences.step(step)[0])
    return torch.cat(parts)
