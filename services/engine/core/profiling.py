"""The largest step that an engine can come to run: run once, to see what memory it takes."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch

from services.engine.core.backends import Backend
from services.engine.core.batch import ForwardBatch
from services.engine.core.gpu_memory import CardMemory, MemoryBudget, MemoryReader, plan_memory
from services.engine.core.layer_groups import LayerGroups
from services.engine.core.model_config import ModelConfig
from services.engine.core.runner import Model
from services.engine.core.sampler import SamplingBatch, sample
from services.engine.core.settings import CoreSettings
from services.engine.core.speculation.controller import MAX_DRAFT_TOKENS
from services.engine.core.speculation.plan_drafts import MAX_DRAFTED_TOKENS
from services.engine.core.token_budget import MAX_SCORED_TOKENS

logger = logging.getLogger(__name__)


def plan_card(
    settings: CoreSettings,
    backend: Backend,
    config: ModelConfig,
    groups: LayerGroups,
    bytes_per_row: int,
    device: torch.device,
    *,
    graphs_bytes: int = 0,
    reader: MemoryReader | None = None,
) -> MemoryBudget:
    """Divide a card's memory for a model whose weights are there, and log how.

    bytes_per_row: of the KV cache, for `block_size` tokens of all layers. graphs_bytes: kept for
    CUDA graphs.

    Raises:
        StartupError: the largest step does not fit, or the cache does not that the settings ask
            for.
    """
    reader = reader or CardMemory(device)
    num_groups = len(groups.windows)

    def run() -> None:
        model, kv_cache = backend.allocate(num_groups, settings, groups)
        free = reader.read().free_bytes
        run_largest_steps(
            model,
            kv_cache,
            settings,
            device=device,
            max_context_tokens=config.max_context_tokens,
            cached_tokens=free // bytes_per_row * settings.block_size,
            num_groups=num_groups,
        )

    budget = plan_memory(settings, reader, run, graphs_bytes=graphs_bytes)
    others = settings.waiting_caches
    parts = f"; the cache is one of {1 + others} equal parts of what is left" if others else ""
    logger.info("memory of %s: %s%s", device, budget, parts)
    return budget


def most_rows(settings: CoreSettings) -> int:
    """Rows whose logits a step may want: one of each sequence, and those of drafts or of prompts
    that are scored, of which steps are planned with so many at most."""
    beside = MAX_SCORED_TOKENS
    if settings.speculation != "off":
        drafted = settings.max_running_sequences * MAX_DRAFT_TOKENS
        beside = max(beside, min(drafted, MAX_DRAFTED_TOKENS))
    return min(settings.max_running_sequences + beside, settings.max_batch_tokens)


def run_largest_steps(
    model: Model,
    kv_cache: Any,
    settings: CoreSettings,
    *,
    device: torch.device,
    max_context_tokens: int,
    cached_tokens: int,
    num_groups: int = 1,
) -> None:
    """Compute a step of prompts and one of decodes, each as large as it can be, and sample.

    kv_cache: of one block or more; all sequences have the same one, over and over, since what is
    computed does not matter. cached_tokens: what a cache of all free memory would hold, which
    bounds what sequences see together.

    Raises:
        torch.OutOfMemoryError: they do not fit.
    """
    tokens = settings.max_batch_tokens
    context = max(1, min(max_context_tokens, cached_tokens))
    prompt = min(tokens, context)
    queries = [prompt] * (tokens // prompt) + [tokens % prompt] * (tokens % prompt > 0)
    contexts = [context, *queries[1:]]
    _run(model, kv_cache, settings, device, queries, contexts, num_groups)
    running = settings.max_running_sequences
    each = max(1, min(max_context_tokens, cached_tokens // running))
    _run(model, kv_cache, settings, device, [1] * running, [each] * running, num_groups)


def _run(
    model: Model,
    kv_cache: Any,
    settings: CoreSettings,
    device: torch.device,
    queries: list[int],
    contexts: list[int],
    num_groups: int,
) -> None:
    block_size, tokens = settings.block_size, sum(queries)
    positions = [
        position
        for query, context in zip(queries, contexts, strict=True)
        for position in range(context - query, context)
    ]
    at = torch.tensor(positions, device=device)
    groups = () if num_groups == 1 else (num_groups,)
    tables = (*groups, len(queries), -(-max(contexts) // block_size))
    rows = min(most_rows(settings), tokens)
    # Where adapters are looked for, projections are made room for that are computed as one without.
    adapters = None
    if settings.max_adapters:
        adapters = torch.full((tokens,), -1, dtype=torch.int32, device=device)
    batch = ForwardBatch(
        token_ids=torch.zeros(tokens, dtype=torch.int64, device=device),
        positions=at,
        slots=(at % block_size).expand(*groups, -1).contiguous(),
        block_tables=torch.zeros(tables, dtype=torch.int32, device=device),
        query_lengths=tuple(queries),
        context_lengths=tuple(contexts),
        logits_rows=torch.arange(rows, device=device),
        token_adapters=adapters,
    )
    with torch.inference_mode():
        sample(model(batch, kv_cache), _sampling(rows))


def _sampling(rows: int) -> SamplingBatch:
    """All that takes memory, of every row."""
    return SamplingBatch(
        temperature=np.full(rows, 0.8, np.float32),
        top_k=np.zeros(rows, np.int64),
        top_p=np.full(rows, 0.9, np.float32),
        min_p=np.full(rows, 0.01, np.float32),
        uniforms=np.full(rows, 0.5),
        logprobs=np.zeros(rows, np.int64),
    )
