"""Random arrivals, cancellations and preemptions: state stays sound, outputs stay right."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from services.engine.core.errors import NeverFitsError, QueueFullError
from services.engine.core.messages import (
    Delta,
    FinishReason,
    Sampling,
    SequenceRequest,
    Stopping,
)
from tests.fakes.engines import make_engine, reference_output

BLOCK_SIZE = 4

tokens = st.integers(0, 50)
samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.7, 1.3]),
    top_k=st.sampled_from([0, 5]),
    top_p=st.sampled_from([1.0, 0.9]),
    min_p=st.sampled_from([0.0, 0.1]),
    seed=st.integers(0, 2**64 - 1),
)
stoppings = st.builds(
    Stopping,
    max_tokens=st.none() | st.integers(1, 24),
    min_tokens=st.integers(0, 3),
    ignore_eos=st.booleans(),
    stop_token_ids=st.lists(tokens, max_size=2).map(tuple),
    stop_sequences=st.lists(st.lists(tokens, min_size=1, max_size=2).map(tuple), max_size=2).map(
        tuple
    ),
)


class EngineUnderRandomLoad(RuleBasedStateMachine):
    """Drives a small engine whose pool is often full, and checks it after every step."""

    @initialize(
        num_blocks=st.integers(4, 16),
        max_batch_tokens=st.integers(4, 24),
        max_running_sequences=st.integers(1, 4),
    )
    def start(self, **limits: Any) -> None:
        self.engine = make_engine(block_size=BLOCK_SIZE, max_waiting_sequences=8, **limits)
        self.context_tokens = limits["num_blocks"] * BLOCK_SIZE
        self.max_batch_tokens = limits["max_batch_tokens"]
        self.live: dict[int, SequenceRequest] = {}
        self.outputs: dict[int, list[int]] = {}
        self.next_id = 0

    @rule(
        prompt=st.lists(tokens, min_size=1, max_size=40),
        sampling=samplings,
        stopping=stoppings,
        priority=st.integers(-1, 1),
    )
    def arrive(
        self, prompt: list[int], sampling: Sampling, stopping: Stopping, priority: int
    ) -> None:
        request = SequenceRequest(
            self.next_id, prompt, sampling, stopping, choice_index=priority + 1, priority=priority
        )
        self.next_id += 1
        needed = len(prompt) + (stopping.max_tokens or 1)
        try:
            self.engine.add([request])
        except NeverFitsError:
            assert needed > self.context_tokens
        except QueueFullError:
            # More than the bound when preempted sequences have come back to wait.
            assert self.engine.load().waiting_sequences >= 8
        else:
            assert needed <= self.context_tokens
            self.live[request.sequence_id] = request
            self.outputs[request.sequence_id] = []

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        sequence_id = data.draw(st.sampled_from(sorted(self.live)))
        (delta,) = self.engine.abort([sequence_id])
        assert delta.finish is not None
        assert delta.finish.reason is FinishReason.ABORTED
        request = self.live.pop(sequence_id)
        so_far = self.outputs[sequence_id]
        assert reference_output(request, self.context_tokens)[: len(so_far)] == so_far
        assert self.engine.abort([sequence_id]) == []

    @precondition(lambda self: self.live)
    @rule(count=st.integers(1, 6))
    def step(self, count: int) -> None:
        for _ in range(count):
            if not self.live:
                break
            step = self.engine.step()
            assert 1 <= step.num_tokens <= self.max_batch_tokens
            for delta in step.deltas:
                self.receive(delta)
            self.engine.check_integrity()

    def receive(self, delta: Delta) -> None:
        output = self.outputs[delta.sequence_id]
        output.extend(delta.token_ids)
        if delta.finish is None:
            return
        request = self.live.pop(delta.sequence_id)
        assert delta.finish.reason in (FinishReason.STOP, FinishReason.LENGTH)
        assert output == reference_output(request, self.context_tokens)
        timing = delta.timing
        assert timing is not None
        assert timing.queued_ns <= timing.prefill_start_ns <= timing.first_token_ns
        assert timing.first_token_ns <= timing.finished_ns

    @invariant()
    def is_sound(self) -> None:
        if hasattr(self, "engine"):
            self.engine.check_integrity()

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        while self.engine.has_work:
            self.step(1)
        assert not self.live
        load = self.engine.load()
        assert load.used_blocks == load.running_sequences == load.waiting_sequences == 0


EngineUnderRandomLoad.TestCase.settings = settings(
    max_examples=100,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TestEngineUnderRandomLoad = EngineUnderRandomLoad.TestCase
