"""The dynamic batcher: whom it takes and when, and that nobody is lost or kept waiting."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from services.engine.core.admission import QueueLimits
from services.engine.core.encoding.batcher import DynamicBatcher, Waiting
from services.engine.core.errors import DrainingError, DuplicateSequenceError, QueueFullError
from services.engine.core.messages import EncodeRequest, EncodeTask
from services.engine.core.settings import BatcherSettings

NO_LIMITS = QueueLimits(max_sequences=1000, max_tokens=10**6)


def request(sequence_id: int, num_tokens: int) -> EncodeRequest:
    return EncodeRequest(sequence_id, [7] * num_tokens, EncodeTask("embed"))


def batcher(target_s: float = float("inf"), **options: object) -> DynamicBatcher:
    return DynamicBatcher(BatcherSettings(**options), NO_LIMITS, target_s=target_s)  # type: ignore[arg-type]


def ids(taken: list[Waiting]) -> list[int]:
    return [waiting.request.sequence_id for waiting in taken]


def test_short_ones_do_not_wait_for_long_ones() -> None:
    queue = batcher()
    queue.add([request(0, 10), request(1, 500), request(2, 12), request(3, 400)], now_s=0)
    assert ids(queue.take()) == [0, 2]
    assert ids(queue.take()) == [1, 3]


def test_short_ones_go_with_a_long_one_whose_turn_it_is() -> None:
    queue = batcher(max_tokens=520)
    queue.add([request(0, 500)], now_s=0)
    queue.add([request(1, 10), request(2, 600), request(3, 9), request(4, 9)], now_s=1)
    assert ids(queue.take()) == [0, 1, 3]


def test_a_long_one_has_its_turn_when_it_has_waited_for_as_long_as_it_takes() -> None:
    queue = batcher(max_tokens=100)
    queue.add([request(0, 100)], now_s=0)
    queue.take()
    queue.learn(100, seconds=1.0)
    queue.add([request(1, 90)], now_s=0)  # its turn: 0.9
    queue.add([request(2, 10)], now_s=0.5)  # 0.6
    queue.add([request(3, 10)], now_s=0.85)  # 0.95
    assert ids(queue.take()) == [2, 3]  # of one class
    queue.add([request(4, 10)], now_s=0.9)  # 1.0
    assert ids(queue.take()) == [1, 4]


def test_a_batch_waits_for_more_until_its_oldest_has_waited_enough() -> None:
    queue = batcher(longest_wait_ms=100, max_sequences=4)
    assert queue.due_in_s(0) is None
    queue.add([request(0, 10)], now_s=0)
    assert queue.due_in_s(0.03) == pytest.approx(0.07)
    queue.add([request(1, 300)], now_s=0.04)
    assert queue.due_in_s(0.05) == pytest.approx(0.05)
    assert queue.due_in_s(0.1) == 0
    queue.add([request(2, 10), request(3, 10)], now_s=0.05)
    assert queue.due_in_s(0.05) == 0  # as many as a batch takes


def test_preferred_sizes_go_at_once_and_others_after_their_wait() -> None:
    queue = batcher(longest_wait_ms=100, preferred_sizes=(8, 4))
    queue.add([request(number, 10) for number in range(3)], now_s=0)
    assert queue.due_in_s(0) == pytest.approx(0.1)
    queue.add([request(number, 10) for number in range(3, 11)], now_s=0.02)
    assert queue.due_in_s(0.02) == 0
    assert ids(queue.take()) == list(range(8))
    assert queue.due_in_s(0.02) == pytest.approx(0.1)
    assert queue.due_in_s(0.121) == 0
    assert ids(queue.take()) == [8, 9, 10]


def test_a_batch_is_as_large_as_is_computed_in_time() -> None:
    queue = batcher(target_s=0.1)
    queue.add([request(number, 100) for number in range(20)], now_s=0)
    queue.take()
    queue.learn(2000, seconds=0.4)
    queue.add([request(number, 100) for number in range(20)], now_s=0)
    assert len(queue.take()) == 5
    queue.add([request(99, 4000)], now_s=0)
    while 99 not in (taken := ids(queue.take())):
        assert len(taken) <= 5
    assert taken == [99]


def test_what_may_not_wait_leaves_nothing_behind() -> None:
    queue = DynamicBatcher(BatcherSettings(), QueueLimits(max_sequences=3, max_tokens=100))
    queue.add([request(0, 10), request(1, 10)], now_s=0)
    with pytest.raises(QueueFullError):
        queue.add([request(2, 10), request(3, 10)], now_s=0)
    with pytest.raises(QueueFullError):
        queue.add([request(2, 90)], now_s=0)
    with pytest.raises(DuplicateSequenceError):
        queue.add([request(2, 10), request(1, 10)], now_s=0)
    assert len(queue) == 2
    assert queue.num_tokens == 20
    queue.draining = True
    with pytest.raises(DrainingError):
        queue.add([request(2, 10)], now_s=0)
    assert ids(queue.take()) == [0, 1]


class BatcherMachine(RuleBasedStateMachine):
    """Sequences come and go while time passes and batches are computed when they are due."""

    @initialize(
        max_sequences=st.integers(1, 6),
        max_tokens=st.integers(1, 200),
        longest_wait_ms=st.sampled_from([0, 50]),
        preferred=st.lists(st.integers(1, 6), max_size=2),
        target_s=st.sampled_from([0.02, float("inf")]),
    )
    def begin(
        self,
        max_sequences: int,
        max_tokens: int,
        longest_wait_ms: float,
        preferred: list[int],
        target_s: float,
    ) -> None:
        self.options = BatcherSettings(
            max_sequences=max_sequences,
            max_tokens=max_tokens,
            longest_wait_ms=longest_wait_ms,
            preferred_sizes=tuple(size for size in preferred if size <= max_sequences),
        )
        self.queue = DynamicBatcher(self.options, NO_LIMITS, target_s=target_s)
        self.now_s = 0.0
        self.waiting: dict[int, tuple[int, float]] = {}  # id -> (tokens, since when)
        self.next_id = 0

    @rule(lengths=st.lists(st.integers(1, 150), min_size=1, max_size=8))
    def add(self, lengths: list[int]) -> None:
        requests = []
        for length in lengths:
            requests.append(request(self.next_id, length))
            self.waiting[self.next_id] = (length, self.now_s)
            self.next_id += 1
        self.queue.add(requests, self.now_s)

    @rule(seconds=st.floats(0.001, 0.1))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        sequence_id = data.draw(st.sampled_from(sorted(self.waiting)))
        assert self.queue.remove(sequence_id)
        assert not self.queue.remove(sequence_id)
        del self.waiting[sequence_id]

    @precondition(lambda self: self.waiting)
    @rule(token_s=st.floats(0.0001, 0.001))
    def compute_what_is_due(self, token_s: float) -> None:
        due_in_s = self.queue.due_in_s(self.now_s)
        assert due_in_s is not None
        assert due_in_s * 1000 <= self.options.longest_wait_ms
        self.now_s += due_in_s
        before = dict(self.waiting)
        batch = self.queue.take()
        taken = [self.waiting.pop(sequence_id) for sequence_id in ids(batch)]
        assert 1 <= len(taken) <= self.options.max_sequences
        num_tokens = sum(length for length, _ in taken)
        assert num_tokens <= self.options.max_tokens or len(taken) == 1
        longest = max(length for length, _ in taken)
        same_class = (longest - 1).bit_length()
        for sequence_id, (length, came_s) in before.items():
            # Within a class of lengths nobody is passed by who came later, unless for want of room.
            if (length - 1).bit_length() == same_class and sequence_id in self.waiting:
                later = [other for other in ids(batch) if before[other][1] > came_s]
                assert not [o for o in later if (before[o][0] - 1).bit_length() == same_class]
        self.now_s += num_tokens * token_s
        self.queue.learn(num_tokens, num_tokens * token_s)

    @rule()
    def those_who_wait_are_all_taken_in_the_end(self) -> None:
        taken: list[int] = []
        while self.queue.due_in_s(self.now_s) is not None:
            taken += ids(self.queue.take())
        assert sorted(taken) == sorted(self.waiting)
        self.waiting.clear()

    @rule(crowd=st.integers(5, 30))
    def nobody_starves(self, crowd: int) -> None:
        """However many short ones keep coming, a long one has its turn."""
        self.queue.add([request(self.next_id, 140)], self.now_s)
        mine = self.next_id
        self.next_id += 1
        for _ in range(200):
            shorts = [request(self.next_id + number, 2) for number in range(crowd)]
            self.queue.add(shorts, self.now_s)
            self.next_id += crowd
            batch = ids(self.queue.take())
            for sequence_id in batch:
                self.waiting.pop(sequence_id, None)
            for each in shorts:
                self.queue.remove(each.sequence_id)
            if mine in batch:
                return
            self.now_s += 0.01
        raise AssertionError("a long sequence was passed by for two seconds")

    @invariant()
    def the_queue_is_whole(self) -> None:
        if hasattr(self, "queue"):
            self.queue.check_integrity()
            assert len(self.queue) == len(self.waiting)


TestBatcherMachine = BatcherMachine.TestCase
TestBatcherMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
