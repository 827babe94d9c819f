"""The engine core: sequences in, deltas out, one step at a time."""

from __future__ import annotations

from services.engine.core.clock import now_ns
from services.engine.core.fault_isolation import IsolatingRunner
from services.engine.core.messages import Delta, FinishReason, Load, SequenceRequest, Step
from services.engine.core.plan import SequenceUpdate
from services.engine.core.runner import Runner
from services.engine.core.scheduler import Scheduler


class EngineCore:
    """Continuous batching over one model. Single-threaded: no call may overlap another."""

    def __init__(self, scheduler: Scheduler, runner: Runner) -> None:
        self._scheduler = scheduler
        self._runner = IsolatingRunner(runner)
        self._sampled_tokens = 0
        self._failed_sequences = 0
        self._last_step_us = 0

    @property
    def has_work(self) -> bool:
        """Whether there is a live sequence, so that `step` would compute something."""
        return self._scheduler.has_work

    def add(self, requests: list[SequenceRequest]) -> None:
        """Take in sequences: all of them or none.

        Raises:
            AdmissionError: one of its subclasses says why they were refused.
        """
        self._scheduler.add(requests)

    def abort(self, sequence_ids: list[int]) -> list[Delta]:
        """End sequences and free their blocks now; ids that are not live are ignored."""
        updates = [self._scheduler.abort(sequence_id) for sequence_id in sequence_ids]
        return [_delta(update) for update in updates if update is not None]

    def drain(self) -> None:
        """Refuse new sequences from here on."""
        self._scheduler.draining = True

    def step(self) -> Step:
        """Compute one step. Precondition: `has_work`.

        Raises:
            FatalEngineError: the engine cannot go on.
            IntegrityError: its state is broken.
        """
        started_ns = now_ns()
        plan = self._scheduler.schedule()
        outputs = self._runner.run(plan)
        updates = self._scheduler.apply(outputs)
        deltas = [_delta(update) for update in updates]
        num_sampled = sum(len(delta.token_ids) for delta in deltas)
        self._sampled_tokens += num_sampled
        self._failed_sequences += sum(
            delta.finish is not None and delta.finish.reason is FinishReason.ERROR
            for delta in deltas
        )
        ended_ns = now_ns()
        self._last_step_us = (ended_ns - started_ns) // 1000
        return Step(
            number=plan.step,
            batch_size=len(plan.sequences),
            num_tokens=plan.num_tokens,
            ended_ns=ended_ns,
            deltas=deltas,
            load=self.load(),
        )

    def load(self) -> Load:
        """How busy the engine is now."""
        scheduler = self._scheduler
        return Load(
            waiting_sequences=scheduler.num_waiting,
            running_sequences=scheduler.num_running,
            used_blocks=scheduler.pool.num_used,
            num_blocks=scheduler.pool.num_blocks,
            steps=scheduler.steps,
            preemptions=scheduler.preemptions,
            prompt_tokens=scheduler.prompt_tokens,
            sampled_tokens=self._sampled_tokens,
            failed_sequences=self._failed_sequences,
            last_step_us=self._last_step_us,
            draining=scheduler.draining,
            cache_queried_tokens=scheduler.block_tables.queried_tokens,
            cache_hit_tokens=scheduler.block_tables.hit_tokens,
            drafted_tokens=scheduler.drafted_tokens,
            accepted_draft_tokens=scheduler.accepted_draft_tokens,
        )

    def check_integrity(self) -> None:
        """Check every invariant of the core's state.

        Raises:
            IntegrityError: one does not hold.
        """
        self._scheduler.check_integrity()


def _delta(update: SequenceUpdate) -> Delta:
    sequence = update.sequence
    is_first = bool(update.token_ids) and sequence.num_output_tokens == len(update.token_ids)
    return Delta(
        sequence_id=sequence.sequence_id,
        token_ids=list(update.token_ids),
        logprobs=list(update.logprobs) or None,
        timing=sequence.timing() if is_first or update.finish is not None else None,
        finish=update.finish,
    )
