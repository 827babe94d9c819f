"""Steps that overlap: while a device computes one, the next is launched behind it."""

from __future__ import annotations

from services.engine.core.device_runner import DeviceRunner, LaunchedStep
from services.engine.core.fault_isolation import (
    IsolatingRunner,
    let_go,
    log_failed_step,
    raise_if_fatal,
)
from services.engine.core.messages import Delta
from services.engine.core.plan import Plan, StepOutputs
from services.engine.core.scheduler import Scheduler


class OverlappingSteps:
    """Brings a scheduler's sequences on by a step at a time, one step ahead of what is known.

    Each call of `advance` launches step n+1, waits for step n, takes in what it brought, and leaves
    n+1 to the device. So the device has its next step before it is through with the one before, and
    what the host does for a step is done beside it.

    At most one step is under way between calls.
    """

    def __init__(
        self, scheduler: Scheduler, runner: DeviceRunner, isolating: IsolatingRunner
    ) -> None:
        """isolating: the same runner, for steps that fail."""
        self._scheduler = scheduler
        self._runner = runner
        self._isolating = isolating
        self._under_way: LaunchedStep | None = None

    def advance(self, *, ahead: bool) -> tuple[StepOutputs, list[Delta]]:
        """Bring on what was planned; returns its outputs and what changed with them.

        ahead: whether the step after it is launched beside it. Precondition: the scheduler has
        work. Raises what IsolatingRunner raises.
        """
        self._forget_what_nobody_awaits()
        current, self._under_way = self._under_way, None
        if current is None:
            plan = self._scheduler.schedule()
            try:
                current = self._launch(plan, None)
            except Exception as error:
                return self._isolate(plan, error)
        following = self._scheduler.schedule_ahead() if ahead else None
        behind: LaunchedStep | None = None
        failure: Exception | None = None
        if following is not None:
            try:
                behind = self._launch(following, current)
            except Exception as error:
                raise_if_fatal(error)
                failure = error
        try:
            outputs = self._runner.finish(current)
        except Exception as error:
            left = self._scheduler.recall(current.plan)
            if behind is not None:
                self._scheduler.recall(behind.plan)
            return self._isolate(left, error)
        self._isolating.count(outputs)
        deltas = self._scheduler.apply(outputs)
        if behind is not None:
            try:
                self._runner.choose(behind)
                self._under_way = behind
            except Exception as error:
                deltas += self._isolate(self._scheduler.recall(behind.plan), error)[1]
        elif following is not None and failure is not None:
            living = [each for each in following.sequences if not each.is_finished]
            deltas += self._isolate(following.of(living), failure)[1]
        return outputs, deltas

    def _launch(self, plan: Plan, behind: LaunchedStep | None) -> LaunchedStep:
        launched = self._runner.launch(plan, behind)
        self._scheduler.launch(plan)
        return launched

    def _isolate(self, plan: Plan, error: Exception) -> tuple[StepOutputs, list[Delta]]:
        """Compute the sequences of a step that failed one by one."""
        raise_if_fatal(error)
        log_failed_step(plan, error)
        let_go(error)
        outputs = self._isolating.run_one_by_one(plan)
        return outputs, self._scheduler.apply(outputs)

    def _forget_what_nobody_awaits(self) -> None:
        """Sequences may have been aborted since the step that is under way was launched."""
        launched = self._under_way
        if launched is not None and not self._scheduler.has_left(launched.plan):
            self._scheduler.recall(launched.plan)
            self._under_way = None
