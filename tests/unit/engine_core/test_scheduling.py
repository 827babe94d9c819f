"""Random arrivals, forks, cancellations, failures, preemptions: state stays sound, outputs right.

The model's output is a hash of all tokens that it reads through the block table, so that a block
shared wrongly, copied too late, published too early or evicted while in use changes an answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from services.engine.core.batch import CapturedShape
from services.engine.core.errors import NeverFitsError, QueueFullError
from services.engine.core.messages import (
    Delta,
    FinishReason,
    Sampling,
    SequenceRequest,
    Stopping,
)
from tests.fakes.engines import make_engine, reference_output
from tests.fakes.hash_model import NAN_TOKEN_ID, RAISING_TOKEN_ID
from tests.fakes.speculators import HalfRightSpeculator

BLOCK_SIZE = 4
POISON = {NAN_TOKEN_ID, RAISING_TOKEN_ID}

tokens = st.integers(0, 50)
# Beginnings that many prompts have in common, of less, exactly, and more than a block.
prefixes = st.sampled_from([[], [9], [9] * 4, [9] * 8, [9] * 8 + [1, 2], [9] * 8 + [5] * 12])
samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.7, 1.3]),
    top_k=st.sampled_from([0, 5]),
    top_p=st.sampled_from([1.0, 0.9]),
    min_p=st.sampled_from([0.0, 0.1]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.5]),
    presence_penalty=st.sampled_from([0.0, 0.0, 2.0]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 1.5]),
    logit_bias=st.sampled_from([{}, {7: 5.0, 8: 4.0}]),
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


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Of so few numbers, waking more takes longer than computing them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class EngineUnderRandomLoad(RuleBasedStateMachine):
    """Drives a small engine whose pool is often full, and checks it after every step."""

    @initialize(
        num_blocks=st.integers(4, 16),
        max_batch_tokens=st.integers(4, 24),
        max_running_sequences=st.integers(1, 4),
        max_waiting_tokens=st.sampled_from([40, 1000]),
        step_latency_target_ms=st.sampled_from([1e-6, 1e6]),
        prefix_cache=st.sampled_from([True, True, False]),
        grows=st.booleans(),
        plans_ahead=st.booleans(),
        overlaps=st.booleans(),
        samples_there=st.booleans(),
        saved_blocks=st.sampled_from([0, 3, 64]),
        captured_shapes=st.sampled_from([(), (CapturedShape(3, 1), CapturedShape(4, 3))]),
        drafts=st.booleans(),
    )
    def start(self, drafts: bool, **limits: Any) -> None:
        self.context_tokens = limits["num_blocks"] * BLOCK_SIZE
        self.engine = make_engine(
            block_size=BLOCK_SIZE,
            max_waiting_sequences=8,
            speculator=HalfRightSpeculator(self.context_tokens, seed=1) if drafts else None,
            **limits,
        )
        self.max_waiting_tokens = limits["max_waiting_tokens"]
        self.max_batch_tokens = limits["max_batch_tokens"]
        self.live: dict[int, SequenceRequest] = {}
        self.outputs: dict[int, list[int]] = {}
        self.next_id = 0

    @rule(
        prefix=prefixes,
        own=st.lists(tokens, min_size=1, max_size=6) | st.lists(tokens, min_size=1, max_size=40),
        poison=st.sampled_from([None] * 12 + [NAN_TOKEN_ID, RAISING_TOKEN_ID]),
        sampling=samplings,
        stopping=stoppings,
        choices=st.sampled_from([1, 1, 2, 4]),
        priority=st.integers(-1, 1),
        tenant=st.sampled_from(["", "a", "b"]),
        cache_salt=st.sampled_from([b"", b"salt"]),
    )
    def arrive(
        self,
        prefix: list[int],
        own: list[int],
        poison: int | None,
        sampling: Sampling,
        stopping: Stopping,
        choices: int,
        **fields: Any,
    ) -> None:
        prompt = prefix + own if poison is None else [*prefix, poison, *own]
        requests = [
            SequenceRequest(
                self.next_id + index, prompt, sampling, stopping, choice_index=index, **fields
            )
            for index in range(choices)
        ]
        self.next_id += choices
        needed = len(prompt) + (stopping.max_tokens or 1)
        try:
            self.engine.add(requests)
        except NeverFitsError:
            assert needed > self.context_tokens
        except QueueFullError:
            # More than the bound when preempted sequences have come back to wait.
            waiting = self.engine.load().waiting_sequences
            assert waiting + choices > 8 or (waiting and self.max_waiting_tokens == 40)
        else:
            assert needed <= self.context_tokens
            for request in requests:
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
        if POISON.intersection(request.prompt_token_ids):
            assert so_far == []
            return
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
        if POISON.intersection(request.prompt_token_ids):
            assert delta.finish.reason is FinishReason.ERROR
            assert output == []
            return
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
        store = self.engine._scheduler.block_tables.store
        assert store is None or store.is_empty  # type: ignore[attr-defined]


EngineUnderRandomLoad.TestCase.settings = settings(
    max_examples=100,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TestEngineUnderRandomLoad = EngineUnderRandomLoad.TestCase
