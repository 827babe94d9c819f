"""Continuous batching: all live sequences, from their arrival through steps to their end."""

from __future__ import annotations

from dataclasses import replace

from services.engine.core.adapters.identity import LoadedAdapter
from services.engine.core.adapters.loaded import Adapters
from services.engine.core.admission import AdmissionLimits, ConcurrencyLimit, QueueLimits
from services.engine.core.arrivals import Arrivals
from services.engine.core.block_pool import BlockPool
from services.engine.core.block_tables import BlockStore, BlockTables
from services.engine.core.clock import now_ns
from services.engine.core.constraints.compilation import Compiler, CompilerCounts
from services.engine.core.entrance import Entrance
from services.engine.core.errors import (
    ConstraintFailedError,
    DrainingError,
    IntegrityError,
)
from services.engine.core.fairness import OUTPUT_TOKEN_COST, PROMPT_TOKEN_COST, TenantCounters
from services.engine.core.lookahead import Lookahead
from services.engine.core.messages import Delta, Finish, FinishReason, SequenceRequest
from services.engine.core.model_config import Window
from services.engine.core.plan import Plan, SequenceOutput, StepOutputs
from services.engine.core.prefix_cache import PrefixCache
from services.engine.core.running_set import RunningSet
from services.engine.core.sequence import Sequence, SequenceState
from services.engine.core.speculation.plan_drafts import plan_drafts
from services.engine.core.speculation.speculator import Speculator
from services.engine.core.step_planner import StepPlanner
from services.engine.core.table_shape import TableShape
from services.engine.core.token_budget import TokenBudget
from services.engine.core.under_way import StepsUnderWay


class Scheduler:
    """Owns all live sequences and their blocks: takes them in, has steps planned for them, and
    takes in what these bring.

    `arrivals` says who is taken in, `step_planner` how many tokens of whom a step computes.

    Between `schedule` and the `apply` of its outputs no sequence may be added or aborted; all that
    may be done then is to ask the `lookahead` what comes next.

    Unless the step is launched: told to a device that computes it while others are planned. Then
    sequences come and go as they like, `schedule_ahead` plans what follows, and the outputs of
    steps are applied in the order of their launches.
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
        max_waiting_tokens: int,
        step_latency_target_ms: float,
        prefix_cache: bool,
        windows: tuple[Window | None, ...] = (None,),
        speculator: Speculator | None = None,
        compiler: Compiler | None = None,
        adapters: Adapters | None = None,
        store: BlockStore | None = None,
    ) -> None:
        """windows: of each group of layers, as LayerGroups has them.
        compiler: of the rules that outputs follow; without one there can be none.
        store: of what preempted sequences have computed, as BlockTables has it."""
        self.pool = pool
        self.limits = limits
        self.draining = False
        self.steps = 0
        self.prompt_tokens = 0  # computed so far, recomputation included
        self.sampled_tokens = 0
        self.failed_sequences = 0
        self._eos_token_ids = eos_token_ids
        self._max_batch_tokens = max_batch_tokens
        self._concurrency = ConcurrencyLimit(max_running_sequences)
        self._budget = TokenBudget(max_batch_tokens, int(step_latency_target_ms * 1e6))
        self._tenants = TenantCounters()
        shape = TableShape.of_steps(pool.block_size, windows, max_batch_tokens)
        self._prefix_cache = PrefixCache(pool, shape, enabled=prefix_cache)
        self.block_tables = BlockTables(pool, self._prefix_cache, shape, store)
        self._running = RunningSet(self.block_tables, max_running_sequences)
        self._entrance = Entrance(
            self.block_tables, self._running, self._tenants, self._concurrency
        )
        self.lookahead = Lookahead(self._running, self._entrance, self.block_tables)
        self._planner = StepPlanner(
            self._running, self._entrance, self.block_tables, self._budget, self._concurrency
        )
        self._under_way = StepsUnderWay()
        self._queue_limits = QueueLimits(max_waiting_sequences, max_waiting_tokens)
        self._arrivals = Arrivals(limits, self._queue_limits, eos_token_ids, compiler, adapters)
        self._compiler = compiler
        self._speculator = speculator
        self._live: dict[int, Sequence] = {}

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for their turn, or for a prefill that they share."""
        return len(self._entrance)

    @property
    def num_running(self) -> int:
        """Sequences that hold blocks."""
        return len(self._running)

    @property
    def preemptions(self) -> int:
        """How often a sequence gave its blocks back to others."""
        return self._planner.preemptions

    @property
    def drafted_tokens(self) -> int:
        """Drafted tokens verified so far."""
        return 0 if self._speculator is None else self._speculator.drafted_tokens

    @property
    def accepted_draft_tokens(self) -> int:
        """Of these, how many the model would have chosen."""
        return 0 if self._speculator is None else self._speculator.accepted_tokens

    @property
    def constraint_counts(self) -> CompilerCounts:
        """What has been done about rules."""
        return CompilerCounts() if self._compiler is None else self._compiler.counts

    @property
    def has_work(self) -> bool:
        """Whether a step would compute anything."""
        return len(self._live) > self._entrance.num_compiling

    @property
    def is_empty(self) -> bool:
        """Whether there is no live sequence, not even one whose rule is being compiled."""
        return not self._live

    @property
    def has_compiled(self) -> bool:
        """Whether there is something to `settle`."""
        return any(True for _ in self._entrance.compiled)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """What ends a sequence unless it ignores that."""
        return self._eos_token_ids

    @property
    def max_waiting_sequences(self) -> int:
        """Sequences that may wait at the same time."""
        return self._queue_limits.max_sequences

    def add(self, requests: list[SequenceRequest], *, continuing: bool = False) -> None:
        """Queue the sequences of a request: all of them or, where one is refused, none.

        continuing: whether they go on with what was taken in before, which is done while draining.

        Raises:
            DrainingError: the engine takes nothing new.
            QueueFullError: the waiting queue has no room for all of them.
            NeverFitsError: one exceeds what the engine can ever hold.
            InvalidSequenceError: one contradicts itself or the model.
            DuplicateSequenceError: an id is in use.
            AdapterNotFoundError: an adapter is not loaded.
        """
        if self.draining and not continuing:
            raise DrainingError("the engine drains and takes no new sequences")
        waiting = (self.num_waiting, self._entrance.num_tokens)
        arrived = self._arrivals.sequences_of(requests, self._live, waiting, continuing=continuing)
        for sequence in arrived:
            self._live[sequence.sequence_id] = sequence
            self._entrance.push(sequence)

    def uses(self, adapter: LoadedAdapter) -> bool:
        """Whether a live sequence goes through an adapter."""
        return any(sequence.adapter is adapter for sequence in self._live.values())

    def abort(self, sequence_id: int) -> Delta | None:
        """End a sequence wherever it is and free its blocks; None if it is not known (any more)."""
        sequence = self._live.get(sequence_id)
        if sequence is None:
            return None
        self._end(sequence, Finish(FinishReason.ABORTED), now_ns())
        return sequence.delta()

    def settle(self) -> list[Delta]:
        """Queue the sequences whose rules have been compiled, and end those whose rules cannot be;
        returns one delta for each of the latter."""
        failed: list[Delta] = []
        if not self._entrance.num_compiling:
            return failed
        for sequence in [*self._entrance.compiled]:
            assert sequence.compilation is not None
            error = sequence.compilation.error
            if error is None:
                self._entrance.begin_waiting(sequence)
                continue
            self._end(sequence, _failure(error), now_ns())
            failed.append(sequence.delta())
        return failed

    def schedule(self) -> Plan:
        """The next step, with drafts where everybody decodes. It is empty only if there is nothing
        to compute."""
        ahead = self.lookahead.take()
        planned, copies = (
            self._planner.plan() if ahead is None else (dict.fromkeys(ahead.sequences, 1), [])
        )
        # A prefill may have a token of a step, too: what a decode has is the last one.
        if (
            self._speculator is not None
            and len(planned) == sum(planned.values())
            and all(each.num_uncomputed_tokens == 1 for each in planned)
        ):
            room = self._max_batch_tokens - len(planned)
            plan_drafts(self._speculator, planned, self.block_tables, self.pool, max_tokens=room)
        if not planned and self.has_work:
            raise IntegrityError("sequences are live, but none can be scheduled")
        self._begin_step()
        if ahead is not None and sum(planned.values()) == ahead.num_tokens:
            return ahead
        return Plan(self.steps, tuple(planned), tuple(planned.values()), tuple(copies))

    def launch(self, plan: Plan) -> None:
        """Note that a device has been told to compute a plan, and to copy what it copies first:
        whoever takes the blocks that were copied comes behind that."""
        self._under_way.launch(plan)
        self._release_copied(plan)

    def recall(self, plan: Plan) -> Plan:
        """Take the earliest launched step back, whose outputs nobody will take in; returns what is
        left of it to be computed once more. What it copied stays copied."""
        remaining = self._under_way.settle(plan)
        assert remaining is not None, "it was launched"
        return replace(plan.of(remaining), block_copies=())

    def has_left(self, plan: Plan) -> bool:
        """Whether anybody waits for the outputs of a launched step."""
        return self._under_way.has_left(plan)

    def schedule_ahead(self) -> Plan | None:
        """The step to follow those under way, as far as it can be told before their outputs come.

        None: there is nothing to be told, or it takes these, be it for drafts or to find somebody
        who gives up room.
        """
        if self._speculator is not None and (
            self._under_way.verify or self._speculator.awaits(self._running.sequences)
        ):
            return None
        following = self._planner.plan_ahead()
        if following is None:
            return None
        planned, copies = following
        self._begin_step()
        return Plan(self.steps, tuple(planned), tuple(planned.values()), tuple(copies))

    def _begin_step(self) -> None:
        self.steps += 1
        self._concurrency.stepped()

    def apply(self, outputs: StepOutputs) -> list[Delta]:
        """Take in what a step brought; returns what changed, one delta per planned sequence that
        got tokens or ended."""
        deltas: list[Delta] = []
        plan = outputs.plan
        remaining = self._under_way.settle(plan)
        if remaining is None:
            self._release_copied(plan)
        if self._speculator is not None:
            self._speculator.observe(outputs)
        num_prefill_tokens = 0
        contended = self._tenants.contended
        for sequence, count, output in zip(
            plan.sequences, plan.token_counts, outputs.outputs, strict=True
        ):
            if remaining is not None and sequence not in remaining:
                continue
            sequence.steps += 1
            if sequence.prefill_start_ns == 0:
                sequence.prefill_start_ns = outputs.started_ns
            # When it was planned: what was launched since does not count.
            uncomputed = sequence.num_tokens - sequence.num_computed_tokens
            if uncomputed > 1:
                num_prefill_tokens += count
            if output.error is not None:
                deltas.append(self._fail(sequence, output.error, outputs.ended_ns))
                continue
            known = min(count, uncomputed)  # the rest was its draft
            if known < count:
                sequence.drafted_tokens += count - known
                sequence.accepted_draft_tokens += output.num_accepted
            num_prompt_left = sequence.num_prompt_tokens - sequence.num_computed_tokens
            if num_prompt_left > 0:
                self.prompt_tokens += min(known, num_prompt_left)
            sequence.num_computed_tokens += known + output.num_accepted
            if output.prompt_logprobs and sequence.prompt_logprobs is not None:
                sequence.prompt_logprobs += output.prompt_logprobs
            sequence.draft_token_ids = ()
            if contended:
                cost = (known if uncomputed > 1 else 0) * PROMPT_TOKEN_COST
                cost += len(output.token_ids) * OUTPUT_TOKEN_COST
                self._tenants.charge(sequence.tenant, cost)
            if output.token_ids:
                deltas.append(self._extend(sequence, output, outputs.ended_ns))
        self._budget.observe(
            plan.num_tokens - num_prefill_tokens,
            num_prefill_tokens,
            outputs.ended_ns - outputs.started_ns,
        )
        return deltas

    def check_integrity(self) -> None:
        """Check the invariants of scheduler, queue, sequences, pool and prefix cache together.

        Raises:
            IntegrityError: one does not hold.
        """
        for sequence in self._live.values():
            sequence.check_integrity(self.block_tables.shape)
        places = [*self._entrance, *self._running]
        if len(places) != len(self._live) or set(places) != set(self._live.values()):
            raise IntegrityError("a live sequence neither waits nor runs, or does both")
        self._entrance.check_integrity()
        self._running.check_integrity()
        for sequence in self._running:
            self._prefix_cache.check_integrity(sequence)

    def _release_copied(self, plan: Plan) -> None:
        if plan.block_copies:
            self.pool.release([source for source, _ in plan.block_copies])

    def _extend(self, sequence: Sequence, output: SequenceOutput, ended_ns: int) -> Delta:
        if sequence.first_token_ns == 0:
            sequence.first_token_ns = ended_ns
        finish = None
        accepted = 0
        for token_id in output.token_ids:
            try:
                finish = sequence.take(token_id)
            except ConstraintFailedError as error:
                return self._fail(sequence, error, ended_ns)
            accepted += 1
            if finish is not None:
                break
        self.sampled_tokens += accepted
        self._prefix_cache.publish(sequence)
        self._entrance.end_prefill(sequence)
        if finish is not None:
            self._end(sequence, finish, ended_ns)
        return sequence.delta(output.token_ids[:accepted], output.logprobs[:accepted])

    def _fail(self, sequence: Sequence, error: Exception, ended_ns: int) -> Delta:
        self.failed_sequences += 1
        self._end(sequence, _failure(error), ended_ns)
        return sequence.delta()

    def _end(self, sequence: Sequence, finish: Finish, ended_ns: int) -> None:
        if sequence.state is SequenceState.RUNNING:
            self._running.leave(sequence)
            self._entrance.end_prefill(sequence)
        else:
            self._entrance.remove(sequence)
            self.block_tables.forget(sequence)
        if self._speculator is not None:
            self._speculator.forget(sequence)
        del self._live[sequence.sequence_id]
        if not self._live:
            self._tenants.reset()
        sequence.state = SequenceState.FINISHED
        sequence.finish = finish
        sequence.finished_ns = ended_ns


def _failure(error: Exception) -> Finish:
    return Finish(FinishReason.ERROR, error=str(error), error_kind=type(error).__name__)
