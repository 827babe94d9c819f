"""Models whose layers have windows under random load: what is seen is there, what is not is given
back, and outputs are right.

The model hashes what each of its groups of layers sees, read through that group's block table.
"""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from services.engine.core.batch import CapturedShape
from services.engine.core.errors import NeverFitsError
from services.engine.core.messages import (
    Delta,
    FinishReason,
    Sampling,
    SequenceRequest,
    Stopping,
)
from services.engine.core.model_config import SparseAttention
from services.engine.core.sequence import NO_BLOCK, Sequence
from tests.fakes.engines import context_of, make_engine, reference_output
from tests.fakes.hash_model import NAN_TOKEN_ID, RAISING_TOKEN_ID, Windows, positions_seen, seen_of
from tests.fakes.speculators import HalfRightSpeculator

BLOCK_SIZE = 4
WINDOWS: list[Windows] = [
    (2,),
    (4,),
    (7,),
    (20,),
    (None, 1),
    (None, 3),
    (None, 8),
    (None, None, 9),
    (None, 6, 6, 6),
    (None, 13, 5),
    (17, 2),
    (SparseAttention(3, 2),),
    (SparseAttention(6, 4), 6),
    (None, SparseAttention(5, 9)),
    (SparseAttention(2, 1), SparseAttention(2, 1), 3),
]

tokens = st.integers(0, 50)
prefixes = st.sampled_from([[], [9] * 4, [9] * 8 + [1, 2], [9] * 8 + [5] * 12, list(range(3, 50))])


class WindowedEngineUnderRandomLoad(RuleBasedStateMachine):
    """Drives a small engine whose pool is often full, and checks it after every step."""

    @initialize(
        windows=st.sampled_from(WINDOWS),
        num_rows=st.integers(4, 20),
        max_batch_tokens=st.integers(4, 24),
        max_running_sequences=st.integers(1, 4),
        step_latency_target_ms=st.sampled_from([1e-6, 1e6]),
        prefix_cache=st.sampled_from([True, True, True, False]),
        grows=st.booleans(),
        plans_ahead=st.booleans(),
        overlaps=st.booleans(),
        saved_blocks=st.sampled_from([0, 3, 64]),
        captured_shapes=st.sampled_from([(), (CapturedShape(3, 1), CapturedShape(4, 3))]),
        drafts=st.booleans(),
    )
    def start(self, windows: Windows, num_rows: int, drafts: bool, **limits: Any) -> None:
        self.windows = windows
        num_blocks = num_rows * len(windows)
        self.max_batch_tokens = limits["max_batch_tokens"]
        self.context_tokens = context_of(num_blocks, BLOCK_SIZE, self.max_batch_tokens, windows)
        speculator = HalfRightSpeculator(self.context_tokens, seed=1, windows=windows)
        self.engine = make_engine(
            num_blocks=num_blocks,
            block_size=BLOCK_SIZE,
            max_waiting_sequences=8,
            windows=windows,
            speculator=speculator if drafts else None,
            **limits,
        )
        self.live: dict[int, SequenceRequest] = {}
        self.outputs: dict[int, list[int]] = {}
        self.next_id = 0

    @rule(
        prefix=prefixes,
        own=st.lists(tokens, min_size=1, max_size=6) | st.lists(tokens, min_size=1, max_size=60),
        poison=st.sampled_from([None] * 12 + [NAN_TOKEN_ID, RAISING_TOKEN_ID]),
        temperature=st.sampled_from([0.0, 1.0]),
        max_tokens=st.integers(1, 40),
        choices=st.sampled_from([1, 1, 2, 4]),
        priority=st.integers(-1, 1),
        tenant=st.sampled_from(["", "a"]),
    )
    def arrive(
        self,
        prefix: list[int],
        own: list[int],
        poison: int | None,
        temperature: float,
        max_tokens: int,
        choices: int,
        **fields: Any,
    ) -> None:
        prompt = prefix + own if poison is None else [*prefix, poison, *own]
        requests = [
            SequenceRequest(
                self.next_id + index,
                prompt,
                Sampling(temperature=temperature, seed=len(own)),
                Stopping(max_tokens=max_tokens, ignore_eos=True),
                choice_index=index,
                **fields,
            )
            for index in range(choices)
        ]
        if self.engine.load().waiting_sequences + choices > 8:
            return
        self.next_id += choices
        try:
            self.engine.add(requests)
        except NeverFitsError:
            assert len(prompt) + max_tokens > self.context_tokens
        else:
            for request in requests:
                self.live[request.sequence_id] = request
                self.outputs[request.sequence_id] = []

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        sequence_id = data.draw(st.sampled_from(sorted(self.live)))
        self.engine.abort([sequence_id])
        del self.live[sequence_id]

    @precondition(lambda self: self.live)
    @rule(count=st.integers(1, 8))
    def step(self, count: int) -> None:
        for _ in range(count):
            if not self.live:
                break
            step = self.engine.step()
            assert isinstance(step.deltas, list)
            for delta in step.deltas:
                self.receive(delta)
            self.is_sound()

    def receive(self, delta: Delta) -> None:
        output = self.outputs[delta.sequence_id]
        output.extend(delta.token_ids)
        if delta.finish is None:
            return
        request = self.live.pop(delta.sequence_id)
        prompt = request.prompt_token_ids
        if RAISING_TOKEN_ID in prompt or NAN_TOKEN_ID in seen_of(prompt, self.windows):
            assert delta.finish.reason is FinishReason.ERROR
            assert output == []
            return
        assert delta.finish.reason is FinishReason.LENGTH
        assert output == reference_output(request, self.context_tokens, self.windows)

    @invariant()
    def is_sound(self) -> None:
        if not hasattr(self, "engine"):
            return
        self.engine.check_integrity()
        for sequence in self.engine._scheduler._running:
            self.check_blocks(sequence)

    def check_blocks(self, sequence: Sequence) -> None:
        """Hold a table against which tokens the next one sees, token by token."""
        width = len(self.windows)
        rows = len(sequence.block_table) // width
        for group, window in enumerate(self.windows):
            column = sequence.block_table[group::width]
            next_token = sequence.num_computed_tokens
            positions = positions_seen(next_token + 1, window)
            seen = {each // BLOCK_SIZE for each in positions if each < next_token}
            assert all(column[row] != NO_BLOCK for row in seen)
            held = sum(block != NO_BLOCK for block in column)
            if window is not None:
                # Wherever its tokens begin in a block; a token more where it is planned ahead.
                near, first = window, 0
                if isinstance(window, SparseAttention):
                    near, first = window.window, window.global_tokens
                most = near + self.max_batch_tokens
                assert held <= -(-first // BLOCK_SIZE) + -(-most // BLOCK_SIZE) + 1
            else:
                assert held == rows

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        while self.engine.has_work:
            self.step(1)
        assert not self.live
        load = self.engine.load()
        assert load.used_blocks == load.running_sequences == load.waiting_sequences == 0


WindowedEngineUnderRandomLoad.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TestWindowedEngineUnderRandomLoad = WindowedEngineUnderRandomLoad.TestCase
