"""Continuous batching: decides before each step which sequences compute how many tokens."""

from __future__ import annotations

from services.engine.core.admission import AdmissionLimits
from services.engine.core.block_pool import BlockPool
from services.engine.core.clock import now_ns
from services.engine.core.errors import (
    DrainingError,
    DuplicateSequenceError,
    IntegrityError,
    QueueFullError,
)
from services.engine.core.messages import Finish, FinishReason, SequenceRequest
from services.engine.core.plan import Plan, SequenceOutput, SequenceUpdate, StepOutputs
from services.engine.core.prefill_sharing import PrefillSharing
from services.engine.core.prefix_cache import Match, PrefixCache
from services.engine.core.sequence import Sequence, SequenceState
from services.engine.core.speculation.speculator import Speculator
from services.engine.core.waiting_queue import WaitingQueue


class Scheduler:
    """Owns all live sequences and their blocks; iteration-level scheduling as in Orca (OSDI '22).

    The order of a step:
      1. every decoding sequence gets its token; where the pool is full, the running sequence of
         the worst rank is preempted (it gives all blocks back and is recomputed later);
      2. prefills under way get what the token budget leaves, best rank first;
      3. waiting sequences enter, best rank first, as long as budget, rows and blocks last. Nobody
         overtakes the head of the queue, and nobody enters in a step that had to preempt.

    A sequence enters only when all tokens it has now fit, so a prefill never waits for blocks, and
    only if one block per running sequence stays free, so that entering does not cause preemption
    in the very next steps. The sequence of the best rank is never preempted for another, hence
    always progresses; and since none is accepted that the whole pool cannot hold, it finishes.

    Between `schedule` and the `apply` of its outputs no sequence may be added or aborted.
    """

    def __init__(
        self,
        pool: BlockPool,
        limits: AdmissionLimits,
        *,
        eos_token_ids: tuple[int, ...],
        max_batch_tokens: int,
        max_running_sequences: int,
        max_waiting_sequences: int,
        prefix_cache: bool = True,
        speculator: Speculator | None = None,
    ) -> None:
        self.pool = pool
        self.limits = limits
        self.draining = False
        self.steps = 0
        self.preemptions = 0
        self.prompt_tokens = 0  # computed so far, recomputation included
        self.cache_queried_tokens = 0  # of all sequences that entered, re-entries included
        self.cache_hit_tokens = 0  # of these, found in the KV cache
        self._eos_token_ids = eos_token_ids
        self._max_batch_tokens = max_batch_tokens
        self._max_running_sequences = max_running_sequences
        self._max_waiting_sequences = max_waiting_sequences
        self._arrivals = 0
        self._live: dict[int, Sequence] = {}
        self._prefix_cache = PrefixCache(pool, enabled=prefix_cache)
        self._sharing = PrefillSharing(self._prefix_cache, pool.block_size)
        self._speculator = speculator
        self._waiting = WaitingQueue()
        self._running: list[Sequence] = []  # best rank first
        self._free_rows = list(range(max_running_sequences - 1, -1, -1))

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for their turn."""
        return len(self._waiting) + len(self._sharing)

    @property
    def drafted_tokens(self) -> int:
        """Tokens that were drafted and verified since start."""
        return 0 if self._speculator is None else self._speculator.drafted_tokens

    @property
    def accepted_draft_tokens(self) -> int:
        """How many of them were what the model says."""
        return 0 if self._speculator is None else self._speculator.accepted_tokens

    @property
    def num_running(self) -> int:
        """Sequences that hold blocks."""
        return len(self._running)

    @property
    def has_work(self) -> bool:
        """Whether a step would compute anything."""
        return bool(self._live)

    def add(self, requests: list[SequenceRequest]) -> None:
        """Queue the sequences of a request: all of them or, where one is refused, none.

        Raises:
            DrainingError: the engine takes nothing new.
            QueueFullError: the waiting queue has no room for all of them.
            NeverFitsError: one exceeds what the engine can ever hold.
            InvalidSequenceError: one contradicts itself or the model.
            DuplicateSequenceError: an id is in use.
        """
        if self.draining:
            raise DrainingError("the engine drains and takes no new sequences")
        max_tokens = [self.limits.max_output_tokens(request) for request in requests]
        ids = {request.sequence_id for request in requests}
        if len(ids) < len(requests) or not ids.isdisjoint(self._live):
            raise DuplicateSequenceError("a sequence id is in use already")
        if self.num_waiting + len(requests) > self._max_waiting_sequences:
            raise QueueFullError(
                f"{self.num_waiting} sequences wait already, of at most "
                f"{self._max_waiting_sequences}"
            )
        queued_ns = now_ns()
        added: list[Sequence] = []
        for request, max_output_tokens in zip(requests, max_tokens, strict=True):
            sequence = Sequence(
                request,
                arrival=self._arrivals,
                eos_token_ids=self._eos_token_ids,
                max_tokens=max_output_tokens,
                queued_ns=queued_ns,
            )
            self._arrivals += 1
            sequence.fork_of = next((each for each in added if each.may_fork(request)), None)
            added.append(sequence)
            self._live[sequence.sequence_id] = sequence
            self._waiting.push(sequence)

    def abort(self, sequence_id: int) -> SequenceUpdate | None:
        """End a sequence wherever it is and free its blocks; None if it is not known (any more)."""
        sequence = self._live.get(sequence_id)
        if sequence is None:
            return None
        finish = Finish(FinishReason.ABORTED)
        self._end(sequence, finish, now_ns())
        return SequenceUpdate(sequence, finish=finish)

    def schedule(self) -> Plan:
        """The next step. It is empty only if there is no live sequence.

        Postcondition: the block table of each planned sequence holds all tokens it will have after
        the step.
        """
        preemptions = self.preemptions
        planned: dict[Sequence, int] = {}
        copies: list[tuple[int, int]] = []
        self._plan_decodes(planned)
        budget = self._max_batch_tokens - sum(planned.values())
        budget = self._plan_prefills(planned, budget)
        if self.preemptions == preemptions:
            self._admit(planned, copies, budget)
        if not planned and self._live:
            raise IntegrityError("sequences are live, but none can be scheduled")
        self._plan_drafts(planned)
        self.steps += 1
        return Plan(self.steps, tuple(planned), tuple(planned.values()), tuple(copies))

    def apply(self, outputs: StepOutputs) -> list[SequenceUpdate]:
        """Take in what a step brought; returns what changed, one update per planned sequence
        that got tokens or ended."""
        updates = []
        plan = outputs.plan
        if self._speculator is not None:
            self._speculator.observe(outputs)
        self.pool.release([source for source, _ in plan.block_copies])
        for sequence, count, output in zip(
            plan.sequences, plan.token_counts, outputs.outputs, strict=True
        ):
            sequence.steps += 1
            if sequence.prefill_start_ns == 0:
                sequence.prefill_start_ns = outputs.started_ns
            if output.error is not None:
                updates.append(self._fail(sequence, output.error, outputs.ended_ns))
                continue
            self.prompt_tokens += max(
                0, min(count, sequence.num_prompt_tokens - sequence.num_computed_tokens)
            )
            known = min(count, sequence.num_uncomputed_tokens)  # the rest was its draft
            sequence.num_computed_tokens += known + output.num_accepted
            sequence.draft_token_ids = ()
            if output.token_ids:
                updates.append(self._extend(sequence, output, outputs.ended_ns))
        return updates

    def check_integrity(self) -> None:
        """Check the invariants of scheduler, queue, sequences, pool and prefix cache together.

        Raises:
            IntegrityError: one does not hold.
        """
        self._waiting.check_integrity()
        self._sharing.check_integrity()
        for sequence in self._live.values():
            sequence.check_integrity(self.pool.block_size)
        places = [*self._waiting, *self._sharing, *self._running]
        if len(places) != len(self._live) or set(places) != set(self._live.values()):
            raise IntegrityError("a live sequence neither waits nor runs, or does both")
        if any(sequence.state is not SequenceState.RUNNING for sequence in self._running):
            raise IntegrityError("the running list holds a sequence that does not run")
        ranks = [sequence.rank for sequence in self._running]
        if ranks != sorted(ranks):
            raise IntegrityError("the running list is out of order")
        rows = [*self._free_rows, *(sequence.row for sequence in self._running)]
        if sorted(rows) != list(range(self._max_running_sequences)):
            raise IntegrityError("a row is lost or shared")
        self.pool.check_integrity(sequence.block_table for sequence in self._running)
        for sequence in self._running:
            self._prefix_cache.check_integrity(sequence)

    def _plan_decodes(self, planned: dict[Sequence, int]) -> None:
        for sequence in tuple(self._running):
            # A sequence further up may have preempted this one.
            if sequence.state is not SequenceState.RUNNING or sequence.num_uncomputed_tokens != 1:
                continue
            if self._grow(sequence, planned):
                planned[sequence] = 1

    def _plan_prefills(self, planned: dict[Sequence, int], budget: int) -> int:
        for sequence in self._running:
            if budget == 0:
                break
            if sequence not in planned:
                planned[sequence] = min(sequence.num_uncomputed_tokens, budget)
                budget -= planned[sequence]
        return budget

    def _admit(
        self, planned: dict[Sequence, int], copies: list[tuple[int, int]], budget: int
    ) -> None:
        while budget and self._free_rows and (sequence := self._waiting.head) is not None:
            match = self._match(sequence)
            leader = self._sharing.leader_for(sequence, match)
            if leader is not None:
                self._sharing.wait(self._waiting.pop(), leader)
                continue
            if not self._fits(sequence, match):
                # Without the copy's source, which would be held beside the copy.
                match = match.without_copy(self.pool.block_size)
                if not self._fits(sequence, match):
                    break
            self._waiting.pop()
            self._enter(sequence, match, copies)
            planned[sequence] = min(sequence.num_uncomputed_tokens, budget)
            budget -= planned[sequence]

    def _plan_drafts(self, planned: dict[Sequence, int]) -> None:
        """Have drafts verified in a step in which every sequence decodes: one that prefills has
        enough to compute. A draft is not worth a block that some sequence will need soon."""
        num_tokens = sum(planned.values())
        if self._speculator is None or num_tokens != len(planned) or not planned:
            return
        drafts = self._speculator.propose(list(planned), self._max_batch_tokens - num_tokens)
        for sequence, draft in zip(tuple(planned), drafts, strict=True):
            missing = self.pool.blocks_for(sequence.num_tokens + len(draft))
            missing -= len(sequence.block_table)
            if not draft or missing > self.pool.num_free - len(self._running):
                continue
            if missing > 0:
                sequence.block_table += self.pool.allocate(missing)
            sequence.draft_token_ids = draft
            planned[sequence] += len(draft)

    def _match(self, sequence: Sequence) -> Match:
        """What of a waiting sequence is in the KV cache already."""
        original = sequence.fork_of
        if original is not None and original.num_computed_tokens >= sequence.num_tokens:
            return Match.of(original.block_table, sequence.num_tokens - 1, self.pool.block_size)
        return self._prefix_cache.match(sequence)

    def _fits(self, sequence: Sequence, match: Match) -> bool:
        held = (
            [*match.blocks] if match.copied_block is None else [*match.blocks, match.copied_block]
        )
        missing = self.pool.blocks_for(sequence.num_tokens) - len(match.blocks)
        taken = missing + self.pool.count_kept(held)
        return taken + len(self._running) <= self.pool.num_free

    def _enter(self, sequence: Sequence, match: Match, copies: list[tuple[int, int]]) -> None:
        pool = self.pool
        pool.share(match.blocks)
        if match.copied_block is not None:
            pool.share([match.copied_block])  # until the copy is made; see `apply`
        missing = pool.blocks_for(sequence.num_tokens) - len(match.blocks)
        sequence.block_table = match.blocks + pool.allocate(missing)
        if match.copied_block is not None:
            copies.append((match.copied_block, sequence.block_table[len(match.blocks)]))
        sequence.num_computed_tokens = match.num_tokens
        self._prefix_cache.adopt(sequence, match)
        sequence.fork_of = None
        if sequence.admissions == 0:
            sequence.cached_prompt_tokens = min(match.num_tokens, sequence.num_prompt_tokens)
        self.cache_queried_tokens += sequence.num_tokens
        self.cache_hit_tokens += match.num_tokens
        sequence.row = self._free_rows.pop()
        sequence.admissions += 1
        sequence.state = SequenceState.RUNNING
        self._insert_running(sequence)
        if sequence.num_uncomputed_tokens > 1:
            self._sharing.lead(sequence)

    def _grow(self, sequence: Sequence, planned: dict[Sequence, int]) -> bool:
        """Make room for all known tokens of `sequence`; False if it was itself preempted."""
        missing = self.pool.blocks_for(sequence.num_tokens) - len(sequence.block_table)
        while missing > self.pool.num_free:
            victim = self._running[-1]
            planned.pop(victim, None)
            self._preempt(victim)
            if victim is sequence:
                return False
        if missing > 0:
            sequence.block_table += self.pool.allocate(missing)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._stop_running(sequence)
        sequence.preemptions += 1
        sequence.state = SequenceState.WAITING
        self._waiting.push(sequence)
        self.preemptions += 1

    def _insert_running(self, sequence: Sequence) -> None:
        # Nearly always at the end: those who wait rank behind those who run, but for priorities.
        index = len(self._running)
        while index and self._running[index - 1].rank > sequence.rank:
            index -= 1
        self._running.insert(index, sequence)

    def _stop_running(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self.pool.release(sequence.block_table)
        sequence.block_table = []
        sequence.num_computed_tokens = 0
        sequence.num_published_blocks = 0
        sequence.draft_token_ids = ()
        self._free_rows.append(sequence.row)
        sequence.row = -1
        if sequence in self._sharing:
            self._finish_prefill(sequence)

    def _finish_prefill(self, leader: Sequence) -> None:
        for follower in self._sharing.finish(leader):
            self._waiting.push(follower)

    def _extend(self, sequence: Sequence, output: SequenceOutput, ended_ns: int) -> SequenceUpdate:
        if sequence.first_token_ns == 0:
            sequence.first_token_ns = ended_ns
        finish = None
        accepted = 0
        for token_id in output.token_ids:
            sequence.token_ids.append(token_id)
            accepted += 1
            finish = sequence.stops.check(sequence.token_ids, sequence.num_prompt_tokens)
            if finish is not None:
                break
        self._prefix_cache.publish(sequence)
        if sequence in self._sharing:
            self._finish_prefill(sequence)
        if finish is not None:
            self._end(sequence, finish, ended_ns)
        return SequenceUpdate(
            sequence, output.token_ids[:accepted], output.logprobs[:accepted], finish
        )

    def _fail(self, sequence: Sequence, error: Exception, ended_ns: int) -> SequenceUpdate:
        finish = Finish(FinishReason.ERROR, error=str(error), error_kind=type(error).__name__)
        self._end(sequence, finish, ended_ns)
        return SequenceUpdate(sequence, finish=finish)

    def _end(self, sequence: Sequence, finish: Finish, ended_ns: int) -> None:
        if sequence.state is SequenceState.RUNNING:
            self._stop_running(sequence)
        elif sequence.awaits is not None:
            self._sharing.remove(sequence)
        else:
            self._waiting.remove(sequence)
        if self._speculator is not None:
            self._speculator.forget(sequence)
        del self._live[sequence.sequence_id]
        sequence.state = SequenceState.FINISHED
        sequence.finish = finish
        sequence.finished_ns = ended_ns
