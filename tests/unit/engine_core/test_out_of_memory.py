"""A step that finds no memory costs the sequence that is too large, and no other."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from services.engine.core.fault_isolation import IsolatingRunner, let_go
from services.engine.core.plan import Plan, SequenceOutput, StepOutputs

ROOM = 6


class Memory:
    """Holds a few units; what an object holds is free again once it is gone."""

    def __init__(self) -> None:
        self.used = 0
        self.emptied = 0

    def take(self, units: int) -> Held:
        if self.used + units > ROOM:
            raise torch.OutOfMemoryError(f"{units} more than {self.used} of {ROOM} do not fit")
        return Held(self, units)


class Held:
    def __init__(self, memory: Memory, units: int) -> None:
        self.memory, self.units = memory, units
        memory.used += units

    def __del__(self) -> None:
        self.memory.used -= self.units


class HungryRunner:
    """Takes as many units for each sequence as it has tokens, one after another."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory

    def run(self, plan: Plan, meanwhile: object = None) -> StepOutputs:
        held = []
        for count in plan.token_counts:
            try:
                held.append(self.memory.take(count))
            except torch.OutOfMemoryError as error:
                # As libraries do that say more of what went wrong.
                raise torch.OutOfMemoryError("the step does not fit") from error
        return StepOutputs(plan, tuple(SequenceOutput((7,)) for _ in held), 0, 0)


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Memory:
    memory = Memory()

    def empty() -> None:
        assert memory.used == 0, "what the failed step held is still there"
        memory.emptied += 1

    monkeypatch.setattr(torch.cuda, "empty_cache", empty)
    return memory


def sequence(tokens: int) -> Any:
    return SimpleNamespace(
        sequence_id=tokens,
        request=SimpleNamespace(request_id=f"r{tokens}"),
        num_uncomputed_tokens=tokens,
        block_table=(),
    )


def test_what_fits_alone_is_computed_and_only_what_does_not_fails(memory: Memory) -> None:
    counts = (4, 5, 8, 6)
    plan = Plan(1, tuple(map(sequence, counts)), counts)
    runner: Any = HungryRunner(memory)
    found = IsolatingRunner(runner).run(plan).outputs
    assert [each.token_ids for each in found] == [(7,), (7,), (), (7,)]
    assert isinstance(found[2].error, torch.OutOfMemoryError)
    # Not even the error that is kept holds on to what the step had taken.
    assert memory.used == 0
    assert memory.emptied == 2


def test_an_error_of_another_kind_lets_go_of_its_step_too(memory: Memory) -> None:
    def fail() -> None:
        held = memory.take(3)
        raise ValueError(held.units)

    try:
        fail()
    except ValueError as error:
        let_go(error)
        assert memory.used == 0
    assert memory.emptied == 0
