"""A draft model changes how many steps an answer takes, and nothing of the answer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from services.engine.core.batch import CapturedShape, ForwardBatch
from services.engine.core.block_pool import BlockPool
from services.engine.core.device_runner import DeviceRunner, LaunchedStep
from services.engine.core.engine import EngineCore
from services.engine.core.messages import Sampling, SequenceRequest, Stopping
from services.engine.core.plan import Plan, StepOutputs
from services.engine.core.runner import Runner
from services.engine.core.speculation.draft_model import DraftModelSpeculator
from services.engine.core.speculation.step_cost import StepCost
from tests.fakes.engines import make_engine
from tests.fakes.hash_model import VOCAB_SIZE, HashCache, hash_model

BLOCK_SIZE = 4
MAX_BATCH_TOKENS = 24
SHAPES = (CapturedShape(2, 1), CapturedShape(4, 1), CapturedShape(12, 4))


@pytest.fixture(autouse=True)
def drafts_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lengths are then as long as acceptance allows: these tests are about answers."""
    monkeypatch.setattr(StepCost, "observe", lambda *_: None)


def speculator_over(
    model: Callable[[ForwardBatch, Any], Tensor], num_blocks: int = 64, *, on_device: bool = False
) -> DraftModelSpeculator:
    """on_device: whether its steps are launched one behind the other, and padded."""
    make_runner: Callable[..., Any] = Runner
    if on_device:
        make_runner = partial(DeviceRunner, vocab_size=VOCAB_SIZE, captured_shapes=SHAPES)
    runner = make_runner(
        model,
        HashCache(num_blocks, BLOCK_SIZE),
        device=torch.device("cpu"),
        block_size=BLOCK_SIZE,
        max_batch_tokens=MAX_BATCH_TOKENS,
        max_running_sequences=4,
        max_context_tokens=num_blocks * BLOCK_SIZE,
    )
    return DraftModelSpeculator(
        runner,
        BlockPool(num_blocks, BLOCK_SIZE),
        max_batch_tokens=MAX_BATCH_TOKENS,
        max_running_sequences=4,
        max_context_tokens=num_blocks * BLOCK_SIZE,
    )


def engine_with(
    speculator: DraftModelSpeculator | None, num_blocks: int = 64, *, overlaps: bool = False
) -> EngineCore:
    return make_engine(
        num_blocks=num_blocks,
        max_batch_tokens=MAX_BATCH_TOKENS,
        speculator=speculator,
        overlaps=overlaps,
    )


def similar_model(batch: ForwardBatch, cache: HashCache) -> Tensor:
    """Agrees with the hash model about most tokens."""
    logits = hash_model(batch, cache)
    shift = torch.randn(logits.shape, generator=torch.Generator().manual_seed(7))
    return logits + shift


def answers_of(engine: EngineCore, requests: list[SequenceRequest]) -> dict[int, list[int]]:
    answers: dict[int, list[int]] = {request.sequence_id: [] for request in requests}
    engine.add(requests)
    while engine.has_work:
        for delta in engine.step().deltas:
            answers[delta.sequence_id] += delta.token_ids
        engine.check_integrity()
    return answers


def request(index: int, prompt: list[int], max_tokens: int = 20, **sampling: Any) -> Any:
    return SequenceRequest(
        index, prompt, Sampling(**sampling), Stopping(max_tokens=max_tokens, ignore_eos=True)
    )


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_draft_model_that_agrees_has_all_its_tokens_accepted_greedy_or_sampled(
    temperature: float, on_device: bool
) -> None:
    requests = [request(index, [index, 5, 9], temperature=temperature) for index in range(3)]
    plain = engine_with(None)
    engine = engine_with(speculator_over(hash_model, on_device=on_device), overlaps=on_device)
    assert answers_of(engine, requests) == answers_of(plain, requests)
    load = engine.load()
    assert load.accepted_draft_tokens == load.drafted_tokens > 0
    assert load.steps < plain.load().steps / 3


@settings(
    deadline=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(
    arrivals=st.lists(
        st.tuples(
            st.lists(st.integers(0, 50), min_size=1, max_size=40),
            st.integers(1, 16),
            st.sampled_from([0.0, 0.8]),
            st.sampled_from([0.0, 0.7]),
        ),
        min_size=1,
        max_size=6,
    ),
    num_blocks=st.integers(16, 32),
    num_draft_blocks=st.integers(1, 32),
    on_device=st.booleans(),
)
def test_answers_are_the_same_whatever_the_draft_model_says_and_has_room_for(
    arrivals: list[tuple[list[int], int, float, float]],
    num_blocks: int,
    num_draft_blocks: int,
    on_device: bool,
) -> None:
    requests = [
        request(index, prompt, count, temperature=heat, frequency_penalty=penalty, seed=index)
        for index, (prompt, count, heat, penalty) in enumerate(arrivals)
    ]
    speculator = speculator_over(similar_model, num_draft_blocks, on_device=on_device)
    engine = engine_with(speculator, num_blocks, overlaps=on_device)
    assert answers_of(engine, requests) == answers_of(engine_with(None, num_blocks), requests)
    speculator.pool.check_integrity([])
    assert speculator.pool.num_used == 0


def test_a_device_has_the_next_draft_step_before_it_is_through_with_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    speculator = speculator_over(hash_model, on_device=True)
    runner = speculator._runner
    assert isinstance(runner, DeviceRunner)
    launch, finish = runner.launch, runner.finish
    entries: list[tuple[str, int]] = []

    def launching(plan: Plan, behind: LaunchedStep | None) -> LaunchedStep:
        entries.append(("launch", plan.step))
        return launch(plan, behind)

    def finishing(launched: LaunchedStep) -> StepOutputs:
        entries.append(("finish", launched.plan.step))
        return finish(launched)

    monkeypatch.setattr(runner, "launch", launching)
    monkeypatch.setattr(runner, "finish", finishing)
    engine = engine_with(speculator)
    engine.add([request(0, [1, 2, 3], max_tokens=5)])
    while engine.has_work:
        engine.step()
    assert engine.load().accepted_draft_tokens == 3
    assert entries == [
        ("launch", 1), ("launch", 2), ("finish", 1), ("launch", 3), ("finish", 2), ("finish", 3)
    ]  # fmt: skip


@pytest.mark.parametrize("on_device", [False, True])
def test_where_the_draft_model_cannot_tell_a_draft_ends(on_device: bool) -> None:
    calls = 0

    def stumbling(batch: ForwardBatch, cache: HashCache) -> Tensor:
        nonlocal calls
        calls += 1
        logits = hash_model(batch, cache)
        if calls % 3 == 0:
            logits[0] = torch.nan  # of one sequence
        return logits

    requests = [request(index, [index, 5, 9], max_tokens=30) for index in range(3)]
    speculator = speculator_over(stumbling, on_device=on_device)
    engine = engine_with(speculator, overlaps=on_device)
    assert answers_of(engine, requests) == answers_of(engine_with(None), requests)
    load = engine.load()
    # What was drafted before and after it is right.
    assert load.accepted_draft_tokens == load.drafted_tokens > 20
    assert not speculator._under_way
    assert speculator.pool.num_used == 0


def test_a_draft_model_that_fails_is_given_up_and_nothing_else_is() -> None:
    def failing(*_: object) -> Tensor:
        raise RuntimeError("a broken draft model")

    requests = [request(0, [1, 2, 3])]
    engine = engine_with(speculator_over(failing))
    assert answers_of(engine, requests) == answers_of(engine_with(None), requests)
    assert engine.load().drafted_tokens == engine.load().failed_sequences == 0


@pytest.mark.parametrize("overlaps", [False, True])
def test_a_draft_model_that_is_always_wrong_is_left_alone(
    overlaps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = 0

    def wrong(batch: ForwardBatch, cache: HashCache) -> Tensor:
        nonlocal steps
        steps += 1
        return -hash_model(batch, cache).clamp(min=-30)

    monkeypatch.setattr(StepCost, "seconds", lambda _, num_tokens: 1 + 0.1 * num_tokens)
    requests = [request(0, [1, 2, 3], max_tokens=200, temperature=0.0)]
    engine = engine_with(speculator_over(wrong), overlaps=overlaps)
    launched: list[Plan] = []
    if overlaps:
        scheduler = engine._scheduler
        ahead = scheduler.schedule_ahead

        def scheduling() -> Plan | None:
            plan = ahead()
            if plan is not None:
                launched.append(plan)
            return plan

        monkeypatch.setattr(scheduler, "schedule_ahead", scheduling)
    assert answers_of(engine, requests) == answers_of(engine_with(None), requests)
    assert 0 < steps < 60
    # Other steps do not wait for drafts that nobody makes.
    assert len(launched) > 150 or not overlaps
    assert engine.load().accepted_draft_tokens == 0
