"""Adds guesses to a step in which everybody decodes."""

from __future__ import annotations

from services.engine.core.block_pool import BlockPool
from services.engine.core.block_tables import BlockTables
from services.engine.core.sequence import Sequence
from services.engine.core.speculation.speculator import Speculator

# Drafted tokens of a step: each takes the logits of a whole vocabulary.
MAX_DRAFTED_TOKENS = 1024


def plan_drafts(
    speculator: Speculator,
    planned: dict[Sequence, int],
    tables: BlockTables,
    pool: BlockPool,
    max_tokens: int,
) -> None:
    """Draft for the decoding sequences of `planned` and count what is to be verified.

    `max_tokens` and `MAX_DRAFTED_TOKENS` bound the drafts together. They get free blocks
    only: a guess is not worth a preemption.
    """
    sequences = list(planned)
    drafts = speculator.propose(sequences, min(max_tokens, MAX_DRAFTED_TOKENS))
    for sequence, draft in zip(sequences, drafts, strict=True):
        if draft and sequence.matcher is not None:
            draft = draft[: sequence.matcher.num_valid(draft)]
        missing = tables.missing_blocks(sequence, len(draft))
        if missing > pool.num_free:
            continue
        if missing > 0:
            end = sequence.num_tokens + len(draft)
            tables.grow(sequence, end, tables.lacking_blocks(sequence, end))
        sequence.draft_token_ids = draft
        planned[sequence] += len(draft)
