"""All of a step's input that is known without the tokens it computes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
import numpy.typing as npt
from torch import Tensor

from services.engine.core.constraints.masks import Follower, StepMasks
from services.engine.core.logit_edits import LogitEdits
from services.engine.core.plan import Plan
from services.engine.core.sampler import SamplingBatch
from services.engine.core.sequence import Sequence
from services.engine.core.sequence_rows import SequenceRows


@dataclass(frozen=True, slots=True)
class LatestTokens:
    """Tokens that the device knows and the host does not yet.

    Attributes:
        token_ids: [rows] int64, as they were sampled.
        row_of: each sequence's token.
        rows: of the tokens in a step's input, and the row of each in `token_ids`.
    """

    token_ids: Tensor
    row_of: dict[Sequence, int]
    rows: list[tuple[int, int]]


@dataclass(slots=True, eq=False)
class Preparation:
    """A step that lacks nothing but its token ids. Arrays are as in ForwardBatch."""

    plan: Plan
    rows: npt.NDArray[np.int64]  # of the planned sequences, in SequenceRows
    num_tokens: list[int]  # of each, those that it has by the time it runs
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
    sampling: SamplingBatch | None = None  # None: nothing is sampled
    masks: StepMasks | None = None  # those of `sampling`, to be filled; None: it has none

    @property
    def sampled_row_of(self) -> dict[Sequence, int]:
        """The row of logits that each sequence is sampled from whose next token is the last of the
        step's; where there are drafts, nobody's."""
        rows: dict[Sequence, int] = {}
        row = 0
        sampled = frozenset(self.sampled)
        for index, sequence in enumerate(self.plan.sequences):
            row += len(self.scores[index]) if self.scores else 0
            if index in sampled and self.drafts is None:
                rows[sequence] = row
                row += 1
        return rows


def prepare(
    plan: Plan, state: SequenceRows, block_size: int, *, num_pending_tokens: int = 0
) -> Preparation:
    """Prepare a plan whose sequences will each have `num_pending_tokens` tokens more, known and
    computed, by the time it runs."""
    step = prepare_input(plan, state, block_size, num_pending_tokens=num_pending_tokens)
    return with_sampling(step, state)


def prepare_input(
    plan: Plan, state: SequenceRows, block_size: int, *, num_pending_tokens: int = 0
) -> Preparation:
    """The same without how tokens are sampled."""
    sequences, counts = plan.sequences, plan.token_counts
    drafts = plan.drafts()
    widest = max(map(state.refresh, sequences))
    rows = np.array([sequence.row for sequence in sequences])
    computed = [
        each.num_computed_tokens + each.num_launched_tokens + num_pending_tokens
        for each in sequences
    ]
    contexts = [before + count for before, count in zip(computed, counts, strict=True)]
    expected = [
        len(each.token_ids) + each.num_pending_tokens + num_pending_tokens for each in sequences
    ]
    beyond = [context - known for context, known in zip(contexts, expected, strict=True)]
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
    return Preparation(
        plan=plan,
        rows=rows,
        num_tokens=expected,
        drafts=drafts,
        positions=positions,
        slots=slots,
        block_tables=tables[..., rows, :widest],
        context_lengths=tuple(contexts),
        logits_rows=logits_rows,
        sampled=sampled,
        scores=scores,
    )


def with_sampling(
    step: Preparation, state: SequenceRows, latest: LatestTokens | None = None
) -> Preparation:
    """Add to a step how its tokens are sampled, and return it. Where logits are edited by what was
    said before, that must be known by now, or be `latest` where counts are all that matters."""
    if step.scores:
        sampling: SamplingBatch | None = _scoring(step, state, latest)
    else:
        sampling = _sampling(step, state, latest)
    step.sampling, step.masks = sampling, None
    sequences = step.plan.sequences
    follow = any(sequences[each].matcher for each in step.sampled)
    if sampling is not None and follow and any(_follows(step, each) for each in step.sampled):
        step.masks = _masks(step)
        step.sampling = replace(sampling, masks=step.masks.masks)
    return step


def _is_there(step: Preparation, index: int) -> bool:
    """Whether a sequence of a step that was prepared before is still where it was."""
    return step.plan.sequences[index].row == int(step.rows[index])


def _follows(step: Preparation, index: int) -> bool:
    return step.plan.sequences[index].matcher is not None and _is_there(step, index)


def _masks(step: Preparation) -> StepMasks:
    followers = []
    row = 0
    sampled = frozenset(step.sampled)
    for index, sequence in enumerate(step.plan.sequences):
        row += len(step.scores[index]) if step.scores else 0
        if index in sampled:
            draft = () if step.drafts is None else step.drafts[index]
            if sequence.matcher is not None and _follows(step, index):
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


def _scoring(step: Preparation, state: SequenceRows, latest: LatestTokens | None) -> SamplingBatch:
    """How rows are sampled of which some score prompts. Nothing is drafted in such a step."""
    given: list[int] = []
    logprobs: list[int] = []
    places: list[int] = []  # of the rows that are sampled from
    sampled = frozenset(step.sampled)
    for index, (sequence, positions) in enumerate(
        zip(step.plan.sequences, step.scores, strict=True)
    ):
        given += sequence.token_ids[positions.start + 1 : positions.stop + 1]
        logprobs += [sequence.sampling.prompt_logprobs or 0] * len(positions)
        if index in sampled:
            places.append(len(given))
            given.append(-1)
            logprobs.append(-1)
    among = _sampling(step, state, latest, places)
    scoring = SamplingBatch.scoring(np.array(given), np.array(logprobs))
    return scoring if among is None else scoring.with_rows(np.array(places), among)


def _sampling(
    step: Preparation,
    state: SequenceRows,
    latest: LatestTokens | None,
    places: list[int] | None = None,
) -> SamplingBatch | None:
    """How the rows that are sampled are. Edits name rows of the step, where those of the first
    token of each sequence are `places`, if given."""
    sampled, drafts = step.sampled, step.drafts
    if not sampled:
        return None
    rows = step.rows[sampled]
    places_in_state = rows.tolist()
    lengths = None if drafts is None else [len(drafts[index]) + 1 for index in sampled]
    if all(state.is_greedy[row] for row in places_in_state):
        return SamplingBatch.greedy(len(rows) if lengths is None else sum(lengths))
    edits = None
    if any(state.has_edits[row] for row in places_in_state):
        edits = LogitEdits(None if latest is None else latest.token_ids)
        first = 0
        for number, (index, row) in enumerate(zip(sampled, places_in_state, strict=True)):
            draft = () if drafts is None else drafts[index]
            if places is not None:
                first = places[number]
            if state.has_edits[row] and _is_there(step, index):
                sequence = step.plan.sequences[index]
                counts = state.token_counts(sequence)
                said = -1
                if latest is not None and sequence.num_pending_tokens:
                    said = latest.row_of[sequence]
                for length in range(len(draft) + 1):
                    edits.add(first + length, sequence, counts, draft[:length], said=said)
            first += len(draft) + 1
    positions = np.array(
        [step.num_tokens[each] - step.plan.sequences[each].num_prompt_tokens for each in sampled]
    )
    if lengths is not None:
        rows = rows.repeat(lengths)
        # From the next token of each sequence on, one after the other.
        firsts = positions - np.cumsum(lengths) + lengths
        positions = np.arange(len(rows)) + firsts.repeat(lengths)
    return state.sampling(rows, positions, edits)
