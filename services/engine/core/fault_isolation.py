"""Keeps one poisoned sequence from taking the others of its step down with it."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Sequence

import torch

from services.engine.core.beside import Work
from services.engine.core.clock import now_ns
from services.engine.core.constraints.masks import MaskCounts
from services.engine.core.errors import FatalEngineError, IntegrityError
from services.engine.core.plan import Plan, SequenceOutput, StepOutputs
from services.engine.core.runner import PlanRunner

logger = logging.getLogger(__name__)

# Steps in a row in which every sequence failed, after which the fault is taken to be the engine's.
_HOPELESS_STEPS = 16


class IsolatingRunner:
    """A runner whose `run` does not fail for the fault of a sequence.

    When a step raises, each of its sequences is run alone; those that raise again carry their
    error in the outputs, the others carry what they computed. Steps are idempotent, so nothing
    that the failed attempt did is in the way.
    """

    def __init__(self, runner: PlanRunner) -> None:
        self._runner = runner
        self._hopeless = HopelessSteps()

    @property
    def mask_counts(self) -> MaskCounts:
        """The masks made so far."""
        return self._runner.mask_counts

    def prepare(self, plan: Plan) -> None:
        """Prepare a plan as `Runner.prepare` does."""
        self._runner.prepare(plan)

    def count(self, outputs: StepOutputs) -> None:
        """Take in the outputs of a step that was run otherwise.

        Raises:
            FatalEngineError: nothing has worked for many steps.
        """
        self._hopeless.count([output.error for output in outputs.outputs])

    def run(self, plan: Plan, meanwhile: Work | None = None) -> StepOutputs:
        """Run the plan as `Runner.run` does.

        Raises:
            FatalEngineError: the device is broken, or nothing has worked for many steps.
            IntegrityError: the engine's own state is broken.
        """
        try:
            outputs = self._runner.run(plan, meanwhile)
        except Exception as error:
            raise_if_fatal(error)
            log_failed_step(plan, error)
            let_go(error)
            return self.run_one_by_one(plan)
        self.count(outputs)
        return outputs

    def run_one_by_one(self, plan: Plan) -> StepOutputs:
        """Run each sequence of a plan alone; those that raise carry their error.

        Raises:
            FatalEngineError, IntegrityError: as `run`.
        """
        started_ns = now_ns()
        outputs: list[SequenceOutput] = []
        for index, sequence in enumerate(plan.sequences):
            try:
                outputs.extend(self._runner.run(plan.alone(index)).outputs)
            except Exception as error:
                raise_if_fatal(error)
                logger.error(
                    "sequence %d of request %r fails alone: %s: %s",
                    sequence.sequence_id,
                    sequence.request.request_id,
                    type(error).__name__,
                    error,
                )
                let_go(error)
                outputs.append(SequenceOutput(error=error))
        found = StepOutputs(plan, tuple(outputs), started_ns, now_ns())
        if outputs:
            self.count(found)
        return found


class HopelessSteps:
    """Counts the steps in a row in which every sequence failed."""

    def __init__(self) -> None:
        self._number = 0

    def count(self, errors: Sequence[Exception | None]) -> None:
        """Take in a step by the error of each of its sequences, None for those without.

        Raises:
            FatalEngineError: nothing has worked for many steps.
        """
        if not all(errors):
            self._number = 0
            return
        self._number += 1
        if self._number >= _HOPELESS_STEPS:
            raise FatalEngineError(
                f"every sequence of {self._number} steps in a row failed; "
                f"the last error was {type(errors[-1]).__name__}: {errors[-1]}"
            )


def log_failed_step(plan: Plan, error: Exception) -> None:
    """Log a step whose sequences are run one by one now."""
    # As text: a record that has the error may be kept, and with it all that the step holds.
    text = "".join(traceback.format_exception(error))
    logger.error("step %d failed; running its sequences one by one\n%s", plan.step, text)


def let_go(error: BaseException) -> None:
    """Free what the frames of a failed step hold: where memory was short, what is run next may need
    what the step had by then."""
    is_out_of_memory = isinstance(error, torch.OutOfMemoryError)
    link: BaseException | None = error
    while link is not None:
        link.__traceback__ = None
        link = link.__cause__ or link.__context__
    if is_out_of_memory:
        torch.cuda.empty_cache()


def raise_if_fatal(error: Exception) -> None:
    """Raise FatalEngineError or IntegrityError where `error` is no sequence's own."""
    if isinstance(error, (FatalEngineError, IntegrityError)):
        raise error
    # After a device-side error every later call on that device fails as well.
    if isinstance(error, torch.AcceleratorError):
        raise FatalEngineError(f"the device failed: {error}") from error
