"""The engine core: sequences in, deltas out, one step at a time."""

from __future__ import annotations

import time
from functools import partial

from services.engine.core.adapters.loaded import Adapters
from services.engine.core.beam_search import BeamSearches
from services.engine.core.clock import now_ns
from services.engine.core.device_runner import DeviceRunner
from services.engine.core.fault_isolation import IsolatingRunner
from services.engine.core.messages import (
    AdapterChanged,
    Delta,
    Ended,
    Load,
    LoadAdapter,
    SequenceRequest,
    Step,
    UnloadAdapter,
)
from services.engine.core.overlap import OverlappingSteps
from services.engine.core.plan import Plan
from services.engine.core.runner import Runner
from services.engine.core.scheduler import Scheduler

# How long the core waits for a rule to be compiled before it looks again, if it has nothing else to
# do.
_COMPILE_POLL_S = 0.001
# The same for an adapter to be read.
_ADAPTER_POLL_S = 0.005


class EngineCore:
    """Continuous batching over one model. Single-threaded: no call may overlap another."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner | DeviceRunner,
        *,
        plans_ahead: bool = False,
        adapters: Adapters | None = None,
    ) -> None:
        """plans_ahead: whether the next step is planned while one is computed, and launched where
        the runner can. adapters: those that the scheduler finds; None: there can be none."""
        self._scheduler = scheduler
        self._adapters = adapters
        self._plans_ahead = plans_ahead
        self._runner = IsolatingRunner(runner)
        self._beam_searches = BeamSearches(scheduler)
        self._overlapping: OverlappingSteps | None = None
        if plans_ahead and isinstance(runner, DeviceRunner):
            self._overlapping = OverlappingSteps(scheduler, runner, self._runner)
        self._last_step_us = 0

    @property
    def has_work(self) -> bool:
        """Whether there is a live sequence, so that `step` brings it on."""
        return not self._scheduler.is_empty

    @property
    def due_in_s(self) -> float | None:
        """When `step` should be called next; None: there is nothing to compute."""
        if self._scheduler.has_work or self._scheduler.has_compiled:
            return 0.0
        if not self._scheduler.is_empty:
            return _COMPILE_POLL_S
        is_changing = self._adapters is not None and self._adapters.is_changing
        return _ADAPTER_POLL_S if is_changing else None

    def add(self, requests: list[SequenceRequest]) -> None:
        """Take in sequences: all of them or none.

        Raises:
            AdmissionError: one of its subclasses says why they were refused.
        """
        if requests and requests[0].sampling.beam_width:
            self._beam_searches.add(requests)
        else:
            self._scheduler.add(requests)

    def abort(self, sequence_ids: list[int]) -> list[Delta]:
        """End sequences and free their blocks now; ids that are not live are ignored."""
        deltas = [
            delta
            for sequence_id in sequence_ids
            if (delta := self._scheduler.abort(sequence_id)) is not None
        ]
        if self._beam_searches:
            deltas += self._beam_searches.abort(sequence_ids)
        return deltas

    def drain(self) -> None:
        """Refuse new sequences from here on."""
        self._scheduler.draining = True

    def change_adapter(self, command: LoadAdapter | UnloadAdapter) -> None:
        """Begin to load or unload an adapter; `adapter_changes` says what came of it."""
        assert self._adapters is not None, "only to be asked where there can be adapters"
        if isinstance(command, LoadAdapter):
            self._adapters.load(command)
        else:
            self._adapters.unload(command)

    def adapter_changes(self) -> list[AdapterChanged]:
        """What has come of commands about adapters since the last call. Not during a step."""
        if self._adapters is None or not self._adapters.is_changing:
            return []
        searches = self._beam_searches
        return self._adapters.settle(
            lambda adapter: self._scheduler.uses(adapter) or searches.uses(adapter.name)
        )

    def step(self) -> Step | Ended:
        """Compute one step, unless nothing can be computed before a rule is compiled.
        Precondition: `has_work`.

        Raises:
            FatalEngineError: the engine cannot go on.
            IntegrityError: its state is broken.
        """
        refused = self._scheduler.settle()
        if not self._scheduler.has_work:
            if not refused:
                time.sleep(_COMPILE_POLL_S)
            return Ended(refused, self.load())
        started_ns = now_ns()
        plan, deltas = self._advance()
        if self._beam_searches:
            deltas = self._beam_searches.take(deltas)
        ended_ns = now_ns()
        self._last_step_us = (ended_ns - started_ns) // 1000
        return Step(
            number=plan.step,
            batch_size=len(plan.sequences),
            num_tokens=plan.num_tokens,
            ended_ns=ended_ns,
            deltas=refused + deltas if refused else deltas,
            load=self.load(),
        )

    def _advance(self) -> tuple[Plan, list[Delta]]:
        if self._overlapping is not None:
            # What a search goes on with is known when a step has ended.
            outputs, deltas = self._overlapping.advance(ahead=not self._beam_searches)
            return outputs.plan, deltas
        plan = self._scheduler.schedule()
        meanwhile = partial(self._plan_ahead, plan) if self._plans_ahead else None
        return plan, self._scheduler.apply(self._runner.run(plan, meanwhile))

    def _plan_ahead(self, plan: Plan) -> None:
        ahead = self._scheduler.lookahead.guess(plan)
        if ahead is not None:
            self._runner.prepare(ahead)

    def load(self) -> Load:
        """How busy the engine is now."""
        scheduler = self._scheduler
        counts = scheduler.constraint_counts
        return Load(
            waiting_sequences=scheduler.num_waiting,
            running_sequences=scheduler.num_running,
            used_blocks=scheduler.pool.num_used,
            num_blocks=scheduler.pool.num_blocks,
            steps=scheduler.steps,
            preemptions=scheduler.preemptions,
            prompt_tokens=scheduler.prompt_tokens,
            sampled_tokens=scheduler.sampled_tokens,
            failed_sequences=scheduler.failed_sequences,
            last_step_us=self._last_step_us,
            draining=scheduler.draining,
            cache_queried_tokens=scheduler.block_tables.queried_tokens,
            cache_hit_tokens=scheduler.block_tables.hit_tokens,
            drafted_tokens=scheduler.drafted_tokens,
            accepted_draft_tokens=scheduler.accepted_draft_tokens,
            compiled_constraints=counts.compiled,
            found_constraints=counts.found,
            constraint_compile_us=counts.compile_us,
            masks=self._runner.mask_counts.masks,
            mask_us=self._runner.mask_counts.us,
        )

    def check_integrity(self) -> None:
        """Check every invariant of the core's state.

        Raises:
            IntegrityError: one does not hold.
        """
        self._scheduler.check_integrity()
