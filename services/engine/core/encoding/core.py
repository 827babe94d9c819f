"""The engine core of an encoder: sequences in, answers out, one batch at a time."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from services.engine.core.clock import now_ns
from services.engine.core.encoding.answers import Answers
from services.engine.core.encoding.batch import make_batch
from services.engine.core.encoding.batcher import DynamicBatcher, Waiting
from services.engine.core.encoding.model import Encodes
from services.engine.core.errors import IntegrityError
from services.engine.core.fault_isolation import HopelessSteps, raise_if_fatal
from services.engine.core.messages import (
    AdapterChanged,
    Answer,
    Delta,
    Encoded,
    EncodeRequest,
    Load,
    LoadAdapter,
    UnloadAdapter,
)

logger = logging.getLogger(__name__)

Outcome: TypeAlias = npt.NDArray[np.float32] | Exception


class NotFiniteError(Exception):
    """What came of a sequence is not a number."""


class Runs(Protocol):
    """Computes batches."""

    def run(self, requests: Sequence[EncodeRequest]) -> list[npt.NDArray[np.float32]]:
        """One answer for each request."""


class EncoderRunner:
    """Reads a batch of sequences and makes their answers."""

    def __init__(self, model: Encodes, answers: Answers, device: torch.device) -> None:
        self._model = model
        self._answers = answers
        self._device = device

    def run(self, requests: Sequence[EncodeRequest]) -> list[npt.NDArray[np.float32]]:
        batch = make_batch(
            [request.token_ids for request in requests],
            [request.second_text_start for request in requests],
            self._device,
        )
        hidden = self._model(batch)
        return self._answers.make(hidden, batch.lengths, [request.task for request in requests])


class EncoderCore:
    """Dynamic batching over one encoder. Single-threaded: no call may overlap another."""

    def __init__(
        self,
        batcher: DynamicBatcher,
        runner: Runs,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._batcher = batcher
        self._runner = runner
        self._clock_s = clock_s
        self._hopeless = HopelessSteps()
        self._queued_ns: dict[int, int] = {}
        self._steps = self._tokens = self._failed = self._last_step_us = 0

    @property
    def due_in_s(self) -> float | None:
        """When `step` should be called next; None: there is nothing to compute."""
        return self._batcher.due_in_s(self._clock_s())

    def add(self, requests: list[EncodeRequest]) -> None:
        """Take in sequences: all of them or none.

        Raises:
            AdmissionError: one of its subclasses says why they were refused.
        """
        self._batcher.add(requests, self._clock_s())
        queued_ns = now_ns()
        self._queued_ns |= {request.sequence_id: queued_ns for request in requests}

    def abort(self, sequence_ids: list[int]) -> list[Delta]:
        """Let sequences leave the queue; nobody waits for their answers any more."""
        for sequence_id in sequence_ids:
            if self._batcher.remove(sequence_id):
                del self._queued_ns[sequence_id]
        return []

    def change_adapter(self, command: LoadAdapter | UnloadAdapter) -> None:
        """Nobody asks an encoder for one: its facts say that there can be none."""
        raise IntegrityError("an encoder has no adapters")

    def adapter_changes(self) -> list[AdapterChanged]:
        """None."""
        return []

    def drain(self) -> None:
        """Refuse new sequences from here on."""
        self._batcher.draining = True

    def step(self) -> Encoded:
        """Compute one batch. Precondition: somebody waits.

        Raises:
            FatalEngineError: the engine cannot go on.
        """
        started_ns = now_ns()
        batch = self._batcher.take()
        outcomes = self._run([waiting.request for waiting in batch])
        ended_ns = now_ns()
        num_tokens = sum(waiting.num_tokens for waiting in batch)
        self._batcher.learn(num_tokens, (ended_ns - started_ns) / 1e9)
        self._steps += 1
        self._tokens += num_tokens
        self._last_step_us = (ended_ns - started_ns) // 1000
        answers = [
            self._answer(waiting, outcome, started_ns)
            for waiting, outcome in zip(batch, outcomes, strict=True)
        ]
        return Encoded(self._steps, len(batch), num_tokens, ended_ns, answers, self.load())

    def load(self) -> Load:
        """How busy the engine is now."""
        return Load(
            waiting_sequences=len(self._batcher),
            steps=self._steps,
            prompt_tokens=self._tokens,
            failed_sequences=self._failed,
            last_step_us=self._last_step_us,
            draining=self._batcher.draining,
        )

    def check_integrity(self) -> None:
        """Check every invariant of the core's state.

        Raises:
            IntegrityError: one does not hold.
        """
        self._batcher.check_integrity()

    def _run(self, requests: list[EncodeRequest]) -> list[Outcome]:
        outcomes: list[Outcome]
        try:
            outcomes = list(self._runner.run(requests))
        except Exception as error:
            raise_if_fatal(error)
            logger.exception("batch %d failed; reading its sequences one by one", self._steps + 1)
            outcomes = [self._run_alone(request) for request in requests]
        outcomes = [_checked(outcome) for outcome in outcomes]
        self._hopeless.count([_error_of(outcome) for outcome in outcomes])
        return outcomes

    def _run_alone(self, request: EncodeRequest) -> Outcome:
        try:
            return self._runner.run([request])[0]
        except Exception as error:
            raise_if_fatal(error)
            return error

    def _answer(self, waiting: Waiting, outcome: Outcome, started_ns: int) -> Answer:
        request = waiting.request
        queued_ns = self._queued_ns.pop(request.sequence_id)
        if isinstance(outcome, Exception):
            self._failed += 1
            logger.error(
                "sequence %d of request %r fails alone: %s: %s",
                request.sequence_id,
                request.request_id,
                type(outcome).__name__,
                outcome,
            )
            return Answer(
                request.sequence_id,
                queued_ns=queued_ns,
                started_ns=started_ns,
                error=str(outcome),
                error_kind=type(outcome).__name__,
            )
        return Answer(request.sequence_id, outcome.astype("<f4").tobytes(), queued_ns, started_ns)


def _checked(outcome: Outcome) -> Outcome:
    if isinstance(outcome, Exception) or np.isfinite(outcome).all():
        return outcome
    return NotFiniteError("the model's answer is not finite")


def _error_of(outcome: Outcome) -> Exception | None:
    return outcome if isinstance(outcome, Exception) else None
