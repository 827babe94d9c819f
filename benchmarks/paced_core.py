"""A core process that computes nothing: real frames at a fixed pace, from sequences of real text.

What the mesh costs depends on how often the core speaks, and a core that computes takes the very
processors that are to be measured. This one sleeps through each step and says one token for every
sequence, so that a mesh can be measured around a core of any speed.
"""

from __future__ import annotations

import os
import sys
import time

from benchmarks.prompts import english_prompts
from services.engine.core.clock import now_ns
from services.engine.core.messages import (
    AdapterChanged,
    Delta,
    Finish,
    FinishReason,
    Load,
    LoadAdapter,
    ModelFacts,
    SequenceRequest,
    Step,
    Timing,
    UnloadAdapter,
)
from services.engine.core.process import Core, run
from services.engine.core.settings import CoreSettings

COMMAND = (sys.executable, "-m", "benchmarks.paced_core")
STEP_MS_VARIABLE = "BENCH_STEP_MS"
MODEL_VARIABLE = "BENCH_MODEL"
CONTEXT_TOKENS = 8192


class _Sequence:
    def __init__(self, request: SequenceRequest, text: list[int]) -> None:
        self.request = request
        self.text = text
        self.produced = 0
        self.queued_ns = now_ns()
        self.first_ns = 0

    def timing(self, finished_ns: int) -> Timing:
        return Timing(
            received_ns=self.request.received_ns,
            queued_ns=self.queued_ns,
            prefill_start_ns=self.queued_ns,
            first_token_ns=self.first_ns,
            finished_ns=finished_ns,
        )


class PacedEngine:
    """Stands in for EngineCore."""

    def __init__(self, step_s: float, texts: list[list[int]]) -> None:
        self._step_s = step_s
        self._texts = texts
        self._live: dict[int, _Sequence] = {}
        self._steps = 0
        self._sampled = 0
        self._next_step_at = 0.0

    @property
    def due_in_s(self) -> float | None:
        """A step is due while a sequence is live."""
        return 0.0 if self._live else None

    def add(self, requests: list[SequenceRequest]) -> None:
        """Takes in sequences."""
        for request in requests:
            text = self._texts[request.sequence_id % len(self._texts)]
            self._live[request.sequence_id] = _Sequence(request, text)

    def abort(self, sequence_ids: list[int]) -> list[Delta]:
        """Ends sequences."""
        gone = [self._live.pop(each, None) for each in sequence_ids]
        return [
            Delta(
                sequence.request.sequence_id,
                timing=sequence.timing(now_ns()),
                finish=Finish(FinishReason.ABORTED),
            )
            for sequence in gone
            if sequence is not None
        ]

    def change_adapter(self, command: LoadAdapter | UnloadAdapter) -> None:
        """Nothing to do: it has no adapters, and nobody asks for one."""

    def adapter_changes(self) -> list[AdapterChanged]:
        """None."""
        return []

    def drain(self) -> None:
        """Nothing to do."""

    def check_integrity(self) -> None:
        """Nothing to check."""

    def step(self) -> Step:
        """One token for every sequence, at the end of the step's time."""
        self._next_step_at = max(self._next_step_at, time.monotonic()) + self._step_s
        time.sleep(max(0.0, self._next_step_at - time.monotonic()))
        self._steps += 1
        deltas = [self._advance(sequence) for sequence in list(self._live.values())]
        self._sampled += len(deltas)
        return Step(self._steps, len(deltas), len(deltas), now_ns(), deltas, self.load())

    def load(self) -> Load:
        """How much there is."""
        return Load(
            running_sequences=len(self._live), steps=self._steps, sampled_tokens=self._sampled
        )

    def _advance(self, sequence: _Sequence) -> Delta:
        token_id = sequence.text[sequence.produced % len(sequence.text)]
        sequence.produced += 1
        is_first = sequence.produced == 1
        now = now_ns()
        if is_first:
            sequence.first_ns = now
        finish = None
        if sequence.produced == sequence.request.stopping.max_tokens:
            finish = Finish(FinishReason.LENGTH)
            del self._live[sequence.request.sequence_id]
        timing = sequence.timing(now if finish else 0) if is_first or finish else None
        return Delta(sequence.request.sequence_id, [token_id], timing=timing, finish=finish)


def build_engine(settings: CoreSettings) -> tuple[Core, ModelFacts]:
    """A paced engine, with the facts that its front asks for."""
    texts = english_prompts(os.environ[MODEL_VARIABLE], 64, 192)
    facts = ModelFacts(
        architecture="paced",
        num_layers=1,
        num_parameters=1,
        vocab_size=1 + max(max(text) for text in texts),
        max_context_tokens=CONTEXT_TOKENS,
        eos_token_ids=(0,),
        dtype="none",
        device="cpu",
        block_size=settings.block_size,
        num_blocks=1,
        kv_cache_memory_bytes=0,
        load_time_s=0.0,
    )
    return PacedEngine(float(os.environ[STEP_MS_VARIABLE]) / 1000, texts), facts


if __name__ == "__main__":
    sys.exit(run(int(sys.argv[1]), build_engine))
