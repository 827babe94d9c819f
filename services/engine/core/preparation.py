"""All of a step's input that is known without the tokens it computes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from services.engine.core.constraints.masks import Follower, StepMasks
from services.engine.core.logit_edits import LogitEdits
from services.engine.core.plan import Plan
from services.engine.core.sampler import SamplingBatch
from services.engine.core.sequence import Sequence
from services.engine.core.sequence_rows import SequenceRows


@dataclass(frozen=True, slots=True)
class Preparation:
    """A step that lacks nothing but its token ids. Arrays are as in ForwardBatch."""

    plan: Plan
    drafts: tuple[tuple[int, ...], ...] | None
    positions: npt.NDArray[np.int64]
    slots: npt.NDArray[np.int64]
    block_tables: npt.NDArray[np.int32]
    context_lengths: tuple[int, ...]
    logits_rows: list[int]
    sampled: list[int]  # indices of the planned sequences that are sampled from
    # Positions of each planned sequence whose logits score its next prompt token; their rows come
    # before those that are sampled from. Empty: nothing is scored.
    scores: list[range]
    sampling: SamplingBatch | None  # None: nothing is sampled
    masks: StepMasks | None  # those of `sampling`, to be filled; None: it has none


def prepare(
    plan: Plan, state: SequenceRows, block_size: int, *, num_pending_tokens: int = 0
) -> Preparation:
    """Prepare a plan whose sequences will each have `num_pending_tokens` tokens more, known and
    computed, by the time it runs."""
    sequences, counts = plan.sequences, plan.token_counts
    drafts = plan.drafts()
    widest = max(map(state.refresh, sequences))
    rows = np.array([sequence.row for sequence in sequences])
    computed = [sequence.num_computed_tokens + num_pending_tokens for sequence in sequences]
    contexts = [before + count for before, count in zip(computed, counts, strict=True)]
    beyond = [
        context - len(sequence.token_ids) - num_pending_tokens
        for context, sequence in zip(contexts, sequences, strict=True)
    ]
    ends = list(accumulate(counts))
    total = ends[-1]
    sampled = [index for index, ahead in enumerate(beyond) if ahead >= 0]
    # Where all decode, their prompts have been scored.
    decodes = drafts is not None or total == len(sampled)
    scores = [] if decodes else _scores(sequences, computed, contexts)
    if scores:
        logits_rows = []
        for end, context, ahead, scored in zip(ends, contexts, beyond, scores, strict=True):
            logits_rows += [end - context + position for position in scored]
            if ahead >= 0:
                logits_rows.append(end - 1)
    elif drafts is None:
        logits_rows = [ends[index] - 1 for index in sampled]
    else:
        logits_rows = [
            row for index in sampled for row in range(ends[index] - beyond[index] - 1, ends[index])
        ]
    if total == len(sequences):
        owners, positions = rows, np.array(computed)
    else:
        owners = rows.repeat(counts)
        # What a token's position and its place in the batch differ by is its sequence's own.
        positions = np.arange(total) + np.repeat(np.subtract(contexts, ends), counts)
    tables = state.block_tables
    places = tables[..., owners, positions // block_size]
    slots = places * np.int64(block_size) + positions % block_size
    sampling = (
        _scoring(plan, sampled, scores, state)
        if scores
        else _sampling(plan, drafts, sampled, state, num_pending_tokens)
    )
    masks = None
    if sampling is not None and any(sequences[index].matcher for index in sampled):
        masks = _masks(plan, drafts, sampled, scores)
        sampling = replace(sampling, masks=masks.masks)
    return Preparation(
        plan=plan,
        drafts=drafts,
        positions=positions,
        slots=slots,
        block_tables=tables[..., rows, :widest],
        context_lengths=tuple(contexts),
        logits_rows=logits_rows,
        sampled=sampled,
        scores=scores,
        sampling=sampling,
        masks=masks,
    )


def _masks(
    plan: Plan,
    drafts: tuple[tuple[int, ...], ...] | None,
    sampled: list[int],
    scores: list[range],
) -> StepMasks:
    followers = []
    row = 0
    sampled_indices = frozenset(sampled)
    for index, sequence in enumerate(plan.sequences):
        row += len(scores[index]) if scores else 0
        if index in sampled_indices:
            draft = () if drafts is None else drafts[index]
            if sequence.matcher is not None:
                followers.append(Follower(index, row, sequence.matcher, draft))
            row += 1 + len(draft)
    return StepMasks(followers)


def _scores(sequences: Iterable[Sequence], computed: list[int], contexts: list[int]) -> list[range]:
    """The positions of each sequence to be scored from, or nothing at all."""
    scores = []
    for sequence, start, end in zip(sequences, computed, contexts, strict=True):
        known = sequence.num_prompt_tokens - 1 - sequence.num_unscored_tokens
        scores.append(range(max(start, known), min(end, sequence.num_prompt_tokens - 1)))
    return scores if any(scores) else []


def _scoring(
    plan: Plan, sampled: list[int], scores: list[range], state: SequenceRows
) -> SamplingBatch:
    """How rows are sampled of which some score prompts. Nothing is drafted in such a step."""
    given: list[int] = []
    logprobs: list[int] = []
    places: list[int] = []  # of the rows that are sampled from
    sampled_indices = frozenset(sampled)
    for index, (sequence, positions) in enumerate(zip(plan.sequences, scores, strict=True)):
        given += sequence.token_ids[positions.start + 1 : positions.stop + 1]
        logprobs += [sequence.sampling.prompt_logprobs or 0] * len(positions)
        if index in sampled_indices:
            places.append(len(given))
            given.append(-1)
            logprobs.append(-1)
    among = _sampling(plan, None, sampled, state, 0, places)
    scoring = SamplingBatch.scoring(np.array(given), np.array(logprobs))
    return scoring if among is None else scoring.with_rows(np.array(places), among)


def _sampling(
    plan: Plan,
    drafts: tuple[tuple[int, ...], ...] | None,
    sampled: list[int],
    state: SequenceRows,
    num_pending_tokens: int,
    places: list[int] | None = None,
) -> SamplingBatch | None:
    """How the rows of `sampled` are sampled. Edits name rows of the step, where those of the first
    token of each sequence are `places`, if given."""
    if not sampled:
        return None
    chosen = [plan.sequences[index] for index in sampled]
    rows = [sequence.row for sequence in chosen]
    lengths = None if drafts is None else [len(drafts[index]) + 1 for index in sampled]
    if all(state.is_greedy[row] for row in rows):
        return SamplingBatch.greedy(len(rows) if lengths is None else sum(lengths))
    edits = None
    if any(state.has_edits[row] for row in rows):
        edits = LogitEdits()
        first = 0
        for number, (index, sequence) in enumerate(zip(sampled, chosen, strict=True)):
            draft = () if drafts is None else drafts[index]
            if places is not None:
                first = places[number]
            if state.has_edits[sequence.row]:
                counts = state.token_counts(sequence)
                for length in range(len(draft) + 1):
                    edits.add(first + length, sequence, counts, draft[:length])
            first += len(draft) + 1
    repeated = np.array(rows)
    positions = np.array([sequence.num_output_tokens for sequence in chosen]) + num_pending_tokens
    if lengths is not None:
        repeated = repeated.repeat(lengths)
        # From the next token of each sequence on, one after the other.
        firsts = positions - np.cumsum(lengths) + lengths
        positions = np.arange(len(repeated)) + firsts.repeat(lengths)
    return state.sampling(repeated, positions, edits)
