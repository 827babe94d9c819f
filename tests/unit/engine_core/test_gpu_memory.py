"""The memory of a card is divided by what the largest step was seen to take, and never promised
twice."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from services.engine.core.errors import StartupError
from services.engine.core.gpu_memory import DEFAULT_FRACTION, Readings, divide, plan_memory
from services.engine.core.settings import CoreSettings

GIB = 2**30


def settings_of(**values: object) -> CoreSettings:
    return CoreSettings(model_path="", **values)  # type: ignore[arg-type]


@dataclass
class FakeCard:
    """A card whose allocator keeps what it was given until it is reset."""

    total: int
    others: int
    held: int
    peak: int = 0
    kept: int = 0
    calls: list[str] = field(default_factory=list)

    def take(self, size: int) -> None:
        """What a step takes and gives back."""
        if self.others + self.held + size > self.total:
            raise torch.OutOfMemoryError("no room")
        self.kept = max(self.kept, size)
        self.peak = max(self.peak, self.held + size)

    def read(self) -> Readings:
        held = self.held + self.kept
        return Readings(self.total, self.total - self.others - held, held, max(held, self.peak))

    def reset(self) -> None:
        self.kept, self.peak = 0, self.held


def test_the_cache_gets_what_weights_the_largest_step_graphs_and_others_leave() -> None:
    card = FakeCard(total=80 * GIB, others=GIB, held=16 * GIB)
    budget = plan_memory(settings_of(), card, lambda: card.take(3 * GIB), graphs_bytes=GIB)
    assert (budget.weights, budget.activations, budget.others) == (16 * GIB, 3 * GIB, GIB)
    assert budget.kv_cache == int(80 * GIB * DEFAULT_FRACTION) - 21 * GIB
    assert budget.left == 80 * GIB - int(80 * GIB * DEFAULT_FRACTION)
    assert str(budget) == (
        "80.00 GiB: weights 16.00, activations 3.00, CUDA graphs 1.00, KV cache 51.00, "
        "driver and other processes 1.00, left free 8.00"
    )
    # What the step was given is torch's again, and nobody's.
    assert card.kept == 0


def test_kernels_that_are_loaded_by_the_step_are_counted() -> None:
    card = FakeCard(total=80 * GIB, others=GIB, held=16 * GIB)

    def step() -> None:
        card.others += 2 * GIB

    assert plan_memory(settings_of(), card, step).others == 3 * GIB


def test_a_step_that_does_not_fit_is_an_error_that_says_what_to_lower() -> None:
    card = FakeCard(total=24 * GIB, others=GIB, held=20 * GIB)
    with pytest.raises(StartupError, match=r"a step of 512 tokens does not fit .*max_batch_tokens"):
        plan_memory(settings_of(), card, lambda: card.take(4 * GIB))


def test_a_cache_that_is_asked_for_must_fit_beside_all_else() -> None:
    card = FakeCard(total=24 * GIB, others=GIB, held=16 * GIB)

    def plan(size: int) -> int:
        asked = settings_of(kv_cache_memory_bytes=size)
        return plan_memory(asked, card, lambda: card.take(2 * GIB)).kv_cache

    # It may take what would otherwise be left free.
    assert plan(5 * GIB) == 5 * GIB
    with pytest.raises(StartupError, match=r"a KV cache of .* does not fit: the card has"):
        plan(5 * GIB + 1)


sizes = st.integers(0, 100 * GIB)


@given(
    total=st.integers(GIB, 200 * GIB),
    others=sizes,
    weights=sizes,
    activations=sizes,
    graphs=sizes,
    awaited=sizes,
    share=st.floats(0.01, 1.0),
    fraction=st.none() | st.floats(0.01, 1.0),
)
def test_whatever_is_there_the_parts_are_the_whole_and_nothing_is_promised_twice(
    total: int,
    others: int,
    weights: int,
    activations: int,
    graphs: int,
    awaited: int,
    share: float,
    fraction: float | None,
) -> None:
    free = total - others - weights
    before = Readings(total, max(0, free), weights, weights)
    after = Readings(total, max(0, free - activations), weights, weights + activations)
    settings = settings_of(
        kv_cache_memory_fraction=fraction, memory_share=share, waiting_weights_bytes=awaited
    )
    budget = divide(settings, before, after, graphs)
    assert sum(budget.by_part().values()) == total == budget.total
    assert budget.kv_cache >= 0
    if budget.kv_cache:
        # All that was seen, and the cache, is within what the engine may take of the card.
        taken = budget.weights + budget.activations + budget.graphs + budget.kv_cache
        assert taken + budget.others <= total * (fraction or DEFAULT_FRACTION)
        assert budget.left >= 0


@given(
    room=st.integers(GIB, 100 * GIB),
    weights=st.lists(st.integers(0, 20 * GIB), min_size=2, max_size=4),
)
def test_models_that_come_one_after_another_find_room_for_their_weights(
    room: int, weights: list[int]
) -> None:
    share = 1 / len(weights)
    card = FakeCard(total=room + sum(weights), others=0, held=0)
    for index, own in enumerate(weights):
        card.held = own
        awaited = sum(weights[index + 1 :])
        settings = settings_of(
            memory_share=share, waiting_weights_bytes=awaited, kv_cache_memory_fraction=1.0
        )
        budget = plan_memory(settings, card, lambda: None)
        assert budget.left >= 0
        # Another process has these by the time the next one starts.
        card.others += own + budget.kv_cache
    assert card.others <= card.total
