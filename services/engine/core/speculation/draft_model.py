"""Drafts by a second, smaller model of the same vocabulary.

The draft model runs through a runner of its own, over a KV cache and a block pool of its own. Each
sequence has a shadow there that holds the same tokens and then the drafted ones. A shadow samples
as its sequence does, with the noise that its sequence will use at the same positions: where the
two models agree about a distribution they draw the same token from it, greedy or not.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import msgspec

from services.engine.core.block_pool import BlockPool
from services.engine.core.clock import now_ns
from services.engine.core.device_runner import DeviceRunner, LaunchedStep
from services.engine.core.plan import Plan, StepOutputs
from services.engine.core.runner import Runner
from services.engine.core.sequence import Sequence, SequenceState
from services.engine.core.speculation.acceptance import Acceptance
from services.engine.core.speculation.controller import MARGIN, MAX_DRAFT_TOKENS, Probing
from services.engine.core.speculation.speculator import Speculator, room_for_draft
from services.engine.core.speculation.step_cost import StepCost
from services.engine.core.under_way import StepsUnderWay

logger = logging.getLogger(__name__)

# A guess of the model does not follow a match; all of them are counted as one class.
_MATCH_LENGTH = 1


@dataclass(slots=True, eq=False)
class _Shadow:
    """A sequence as the draft model has it: its first `num_known` tokens, then drafted ones."""

    sequence: Sequence
    num_known: int
    acceptance: Acceptance


class DraftModelSpeculator(Speculator):
    """Drafts with a model, as many tokens for all sequences of a step as pay on average.

    A draft model that fails is given up for good: answers never depend on it.
    """

    def __init__(
        self,
        runner: Runner | DeviceRunner,
        pool: BlockPool,
        *,
        max_batch_tokens: int,
        max_running_sequences: int,
        max_context_tokens: int,
    ) -> None:
        super().__init__()
        self.pool = pool
        self._runner = runner
        self._max_batch_tokens = max_batch_tokens
        self._max_context_tokens = max_context_tokens
        self._free_rows = list(range(max_running_sequences - 1, -1, -1))
        self._shadows: dict[int, _Shadow] = {}
        self._shared = Acceptance()
        self._draft_cost = StepCost()
        self._probing = Probing()
        self._steps = 0
        self._under_way = StepsUnderWay()
        self._is_broken = False

    def propose(self, sequences: list[Sequence], max_tokens: int) -> list[tuple[int, ...]]:
        """What the draft model samples after each sequence's tokens."""
        nothing: list[tuple[int, ...]] = [()] * len(sequences)
        if self._is_broken:
            return nothing
        started_ns = now_ns()
        shadows = [self._shadow_of(sequence) for sequence in sequences]
        for shadow, sequence in zip(shadows, sequences, strict=True):
            if shadow is not None:
                _catch_up(shadow, sequence)
        acceptances = [self._shared if each is None else each.acceptance for each in shadows]
        length = min(self._length(acceptances), max_tokens // len(sequences))
        if length == 0:
            return nothing
        wanted = [
            (
                shadow.sequence,
                min(
                    shadow.num_known + min(length, room_for_draft(sequence)),
                    self._max_context_tokens,
                ),
            )
            for shadow, sequence in zip(shadows, sequences, strict=True)
            if shadow is not None
        ]
        try:
            self._generate(wanted)
        except Exception:
            logger.exception("the draft model failed; going on without it")
            self._is_broken = True
            return nothing
        self._drafting_ns = now_ns() - started_ns
        return [
            () if shadow is None else tuple(shadow.sequence.token_ids[shadow.num_known :])
            for shadow in shadows
        ]

    def awaits(self, sequences: list[Sequence]) -> bool:
        """Whether drafts pay on average."""
        self._idle.is_avoidable = True
        if self._is_broken or any(each.num_uncomputed_tokens > 1 for each in sequences):
            return False
        going_on = [each for each in sequences if not each.is_complete]
        shadows = [self._shadows.get(each.arrival) for each in going_on]
        acceptances = [self._shared if each is None else each.acceptance for each in shadows]
        if not acceptances:
            return False
        if self._best_length(acceptances)[1] or self._probing.is_due:
            return True
        self._probing.pass_over()
        return False

    def forget(self, sequence: Sequence) -> None:
        """Give back the blocks and the row of a sequence's shadow."""
        shadow = self._shadows.pop(sequence.arrival, None)
        if shadow is not None:
            self.pool.release(shadow.sequence.block_table)
            self._free_rows.append(shadow.sequence.row)

    def _shadow_of(self, sequence: Sequence) -> _Shadow | None:
        shadow = self._shadows.get(sequence.arrival)
        if shadow is None and self._free_rows:
            # Nobody reads the log-probabilities of a draft.
            sampling = msgspec.structs.replace(sequence.sampling, logprobs=None)
            request = msgspec.structs.replace(sequence.request, sampling=sampling)
            twin = Sequence(
                request,
                arrival=sequence.arrival,
                eos_token_ids=(),
                max_tokens=sequence.max_tokens,
                queued_ns=sequence.queued_ns,
            )
            twin.stops = sequence.stops
            twin.row = self._free_rows.pop()
            twin.state = SequenceState.RUNNING
            shadow = _Shadow(twin, twin.num_tokens, Acceptance(self._shared))
            self._shadows[sequence.arrival] = shadow
        return shadow

    def _length(self, acceptances: list[Acceptance]) -> int:
        """The number of drafted tokens per sequence to take in."""
        length, pays = self._best_length(acceptances)
        if pays:
            self._probing.pays()
            return length
        return length if self._probing.pass_over() else 0

    def _best_length(self, acceptances: list[Acceptance]) -> tuple[int, bool]:
        """The number of drafted tokens per sequence that brings the most tokens per second, and
        whether that is more than without any."""
        count = len(acceptances)
        draft_s = self._draft_cost.seconds(count) if self._draft_cost.is_measured else 0.0
        survivals = [each.survival(_MATCH_LENGTH, MAX_DRAFT_TOKENS) for each in acceptances]
        expected = float(count)
        plain = expected / self._cost.seconds(count)
        best, best_length = 0.0, 1
        for length in range(1, MAX_DRAFT_TOKENS + 1):
            expected += sum(survival[length - 1] for survival in survivals)
            step_s = self._cost.seconds(count * (1 + length)) + self._idle.seconds()
            rate = expected / (step_s + length * draft_s)
            if rate > best:
                best, best_length = rate, length
        return best_length, best > plain * MARGIN

    def _generate(self, wanted: list[tuple[Sequence, int]]) -> None:
        """Sample for each shadow until it has as many tokens as wanted.

        A device that takes the tokens of a step where it left them has the next one before it is
        through with it, and does not wait for the host in between.
        """
        runner = self._runner
        behind: LaunchedStep | None = None
        while plan := self._plan(wanted):
            launched: LaunchedStep | None = None
            if isinstance(runner, DeviceRunner):
                launched = runner.launch(plan, behind)
                outputs = None if behind is None else runner.finish(behind)
            else:
                outputs = runner.run(plan)
            self._under_way.launch(plan)
            # One that is still at its prompt goes on with it in the next step.
            sampled = {twin for twin in plan.sequences if twin.num_pending_tokens}
            if outputs is not None:
                sampled -= self._take(outputs)
            if isinstance(runner, DeviceRunner) and launched is not None:
                runner.choose(launched)
            wanted = [pair for pair in wanted if pair[0] in sampled]
            behind = launched
        if isinstance(runner, DeviceRunner) and behind is not None:
            self._take(runner.finish(behind))

    def _plan(self, wanted: list[tuple[Sequence, int]]) -> Plan | None:
        planned: dict[Sequence, int] = {}
        budget = self._max_batch_tokens
        for twin, num_tokens in wanted:
            count = min(twin.num_uncomputed_tokens, budget)
            if count and twin.num_expected_tokens < num_tokens and self._grow(twin):
                planned[twin] = count
                budget -= count
        if not planned:
            return None
        self._steps += 1
        return Plan(self._steps, tuple(planned), tuple(planned.values()))

    def _take(self, outputs: StepOutputs) -> set[Sequence]:
        """Take in what a step brought; returns whom it failed, who take nothing any more from what
        has been launched behind it."""
        plan = outputs.plan
        if plan.num_tokens == len(plan.sequences):
            seconds = (outputs.ended_ns - outputs.started_ns) / 1e9
            self._draft_cost.observe(len(plan.sequences), seconds)
        remaining = self._under_way.settle(plan)
        assert remaining is not None, "it was launched"
        failed: set[Sequence] = set()
        for twin, count, output in zip(
            plan.sequences, plan.token_counts, outputs.outputs, strict=True
        ):
            if twin not in remaining:
                continue
            if output.error is not None:
                twin.num_launched_tokens = twin.num_pending_tokens = 0
                twin.admissions += 1
                failed.add(twin)
                continue
            twin.num_computed_tokens += count
            twin.token_ids.extend(output.token_ids)
        return failed

    def _grow(self, twin: Sequence) -> bool:
        missing = self.pool.blocks_for(twin.num_expected_tokens) - len(twin.block_table)
        if missing > self.pool.num_free:
            return False
        if missing > 0:
            twin.block_table += self.pool.allocate(missing)
        return True


def _catch_up(shadow: _Shadow, sequence: Sequence) -> None:
    """Take in the sequence's new tokens, and learn which of the drafted ones were right."""
    twin, known = shadow.sequence, shadow.num_known
    drafted = twin.num_tokens - known
    come = sequence.num_tokens - known
    right = 0
    while right < min(drafted, come) and (
        twin.token_ids[known + right] == sequence.token_ids[known + right]
    ):
        shadow.acceptance.observe(_MATCH_LENGTH, correct=True)
        right += 1
    if right < min(drafted, come):
        shadow.acceptance.observe(_MATCH_LENGTH, correct=False)
    del twin.token_ids[known + right :]
    twin.token_ids.extend(sequence.token_ids[known + right :])
    # The last token is computed anew where everything is: something must be, to sample from.
    twin.num_computed_tokens = min(twin.num_computed_tokens, known + right, sequence.num_tokens - 1)
    shadow.num_known = sequence.num_tokens
