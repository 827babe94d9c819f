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
    waiting=st.integers(0, 3),
    caches=st.integers(0, 3),
    limit=st.none() | sizes,
    fraction=st.none() | st.floats(0.01, 1.0),
)
def test_whatever_is_there_the_parts_are_the_whole_and_nothing_is_promised_twice(
    total: int,
    others: int,
    weights: int,
    activations: int,
    graphs: int,
    awaited: int,
    waiting: int,
    caches: int,
    limit: int | None,
    fraction: float | None,
) -> None:
    free = total - others - weights
    before = Readings(total, max(0, free), weights, weights)
    after = Readings(total, max(0, free - activations), weights, weights + activations)
    settings = settings_of(
        kv_cache_memory_fraction=fraction,
        waiting_models=waiting,
        waiting_caches=caches,
        waiting_weights_bytes=awaited,
        kv_cache_limit_bytes=limit,
    )
    budget = divide(settings, before, after, graphs)
    assert sum(budget.by_part().values()) == total == budget.total
    assert budget.kv_cache >= 0
    if budget.kv_cache:
        # All that was seen, and the cache, is within what the engine may take of the card.
        taken = budget.weights + budget.activations + budget.graphs + budget.kv_cache
        assert taken + budget.others <= total * (fraction or DEFAULT_FRACTION)
        assert budget.left >= 0


@dataclass
class Hosted:
    """A model of an engine whose models share a card."""

    weights: int
    step: int
    cache: int = 0
    own_size: int | None = None  # of its cache, if one was chosen
    is_there: bool = False


class SharedCard:
    """What an engine does as its models come and go, with a card made up for the purpose."""

    def __init__(self, total: int, models: list[Hosted]) -> None:
        self.total, self.models = total, models

    def load(self, model: Hosted, **fields: object) -> None:
        """Give a model its cache, as an engine does that knows who is not in memory."""
        others = [each for each in self.models if each is not model]
        away = [each for each in others if not each.is_there]
        taken = sum(each.weights + each.step + each.cache for each in others if each.is_there)
        card = FakeCard(self.total, others=taken, held=model.weights)
        told: dict[str, object] = {
            "waiting_models": len(away),
            "waiting_caches": sum(each.own_size is None for each in away),
            "waiting_weights_bytes": sum(each.weights for each in away),
            "waiting_cache_bytes": sum(each.own_size or 0 for each in away),
            "kv_cache_memory_bytes": model.own_size,
        }
        budget = plan_memory(settings_of(**told | fields), card, lambda: card.take(model.step))
        assert budget.left >= 0
        model.cache, model.is_there = budget.kv_cache, True


hosted = st.lists(
    st.builds(Hosted, weights=st.integers(0, 20 * GIB), step=st.just(GIB)), min_size=2, max_size=5
)


@given(room=st.integers(8 * GIB, 100 * GIB), models=hosted)
def test_caches_of_several_models_are_alike_and_take_all_there_is(
    room: int, models: list[Hosted]
) -> None:
    fixed = sum(each.weights + each.step for each in models)
    card = SharedCard(int((fixed + room) / DEFAULT_FRACTION) + 1, models)
    for model in models:
        card.load(model)
    caches = [each.cache for each in models]
    assert max(caches) - min(caches) <= len(models)
    assert abs(sum(caches) - room) <= len(models) + 1


@given(
    room=st.integers(8 * GIB, 100 * GIB),
    models=hosted,
    events=st.lists(st.tuples(st.sampled_from(["sleep", "wake"]), st.integers(0, 4)), max_size=20),
)
def test_a_model_that_wakes_finds_what_it_had(
    room: int, models: list[Hosted], events: list[tuple[str, int]]
) -> None:
    fixed = sum(each.weights + each.step for each in models)
    card = SharedCard(int((fixed + room) / DEFAULT_FRACTION) + 1, models)
    for event, index in events:
        model = models[index % len(models)]
        if event == "sleep":
            model.is_there = False
        elif not model.is_there:
            card.load(model)
    for model in models:
        if not model.is_there:
            card.load(model)
    assert all(abs(each.cache - room // len(models)) <= len(models) for each in models)


def test_steps_that_differ_and_caches_of_a_chosen_size_take_from_nobody_who_was_promised() -> None:
    first = Hosted(10 * GIB, step=GIB)
    chosen = Hosted(5 * GIB, step=2 * GIB, own_size=3 * GIB)
    last = Hosted(20 * GIB, step=4 * GIB)
    card = SharedCard(100 * GIB, [first, chosen, last])
    for model in (first, chosen, last):
        card.load(model)
    # Of 90: 35 of weights, 3 that were chosen, and steps as the first knew them, 3 times 1.
    assert first.cache == (90 - 35 - 3 - 3) * GIB // 2
    assert chosen.cache == 3 * GIB
    # Steps that take more than the first one's come out of what is the last one's.
    assert last.cache == first.cache - (1 + 3) * GIB


def test_a_core_that_comes_back_takes_no_more_than_it_had() -> None:
    models = [Hosted(10 * GIB, step=GIB) for _ in range(3)]
    card = SharedCard(100 * GIB, models)
    for model in models:
        card.load(model)
    had = [each.cache for each in models]
    # A fault of the card ends all of them at once.
    for model in models:
        model.is_there = False
    for model, size in zip(models, had, strict=True):
        card.load(
            model,
            kv_cache_limit_bytes=size,
            waiting_models=0,
            waiting_caches=0,
            waiting_weights_bytes=0,
        )
    assert [each.cache for each in models] == had
