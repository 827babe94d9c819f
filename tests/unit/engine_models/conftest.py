"""Driving a model by hand over a paged cache, and small checkpoints to drive."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from services.engine.core.batch import ForwardBatch
from services.engine.core.kv_cache import KVCache
from services.engine.core.models import Model

BLOCK_SIZE = 4


class Stepper:
    """Feeds token ids of several sequences to a model step by step, its blocks in random order."""

    def __init__(self, model: Model, num_blocks: int = 64, seed: int = 0) -> None:
        config = model.config
        dtype = next(model.parameters()).dtype
        self.model = model
        self.cache = KVCache(
            config.num_layers,
            num_blocks,
            BLOCK_SIZE,
            config.kv_heads,
            config.head_dim,
            dtype,
            "cpu",
        )
        self.free = list(range(num_blocks))
        random.Random(seed).shuffle(self.free)
        self.tables: dict[str, list[int]] = {}
        self.lengths: dict[str, int] = {}

    def step(self, tokens: dict[str, list[int]]) -> dict[str, Tensor]:
        """Append each sequence's tokens; returns its logits at all of them, [tokens, vocab]."""
        batch = self.make_batch(tokens)
        logits = self.model(batch, self.cache)
        return dict(zip(tokens, logits.split(batch.query_lengths), strict=True))

    def make_batch(self, tokens: dict[str, list[int]]) -> ForwardBatch:
        ids, positions, slots = [], [], []
        for name, new in tokens.items():
            table = self.tables.setdefault(name, [])
            start = self.lengths.get(name, 0)
            while len(table) * BLOCK_SIZE < start + len(new):
                table.append(self.free.pop())
            for position, token in enumerate(new, start):
                ids.append(token)
                positions.append(position)
                slots.append(table[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE)
            self.lengths[name] = start + len(new)
        widest = max(len(self.tables[name]) for name in tokens)
        padded = [self.tables[name] + [0] * (widest - len(self.tables[name])) for name in tokens]
        return ForwardBatch(
            torch.tensor(ids),
            torch.tensor(positions),
            torch.tensor(slots),
            torch.tensor(padded, dtype=torch.int32),
            tuple(len(new) for new in tokens.values()),
            tuple(self.lengths[name] for name in tokens),
            torch.arange(len(ids)),
        )

    def greedy(self, prompt: list[int], num_tokens: int, name: str = "only") -> list[int]:
        """Return the greedy completion of a prompt, token by token."""
        completion: list[int] = []
        new = prompt
        for _ in range(num_tokens):
            completion.append(int(self.step({name: new})[name][-1].argmax()))
            new = completion[-1:]
        return completion


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny models gain nothing from threads, and lose much where tests share the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def stepper() -> type[Stepper]:
    return Stepper


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> Callable[..., tuple[Path, LlamaForCausalLM]]:
    """Write a small random Llama with `save_pretrained`; returns its directory and itself."""

    def make(**changes: Any) -> tuple[Path, LlamaForCausalLM]:
        save = {key: changes.pop(key) for key in ("max_shard_size", "dtype") if key in changes}
        fields = {
            "vocab_size": 97,
            "hidden_size": 48,
            "intermediate_size": 80,
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "initializer_range": 0.3,
            "eos_token_id": 2,
            "bos_token_id": 1,
        }
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**{**fields, **changes})).eval()
        # Biases and norms start as zeros and ones, which would hide mistakes with them.
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.3)
        directory = tmp_path / "model"
        shard = {"max_shard_size": save["max_shard_size"]} if "max_shard_size" in save else {}
        model.to(save.get("dtype", torch.float32)).save_pretrained(directory, **shard)
        return directory, model

    return make
