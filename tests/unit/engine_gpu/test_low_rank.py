"""Each token goes through its own adapter, told on the device which, as the reference has it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from services.engine.core.kernels import (
    AdapterTable,
    LowRankPart,
    SlottedParts,
    add_low_rank,
    add_low_ranks,
    group_by_adapter,
)
from services.engine.core.kernels.triton import low_rank as module

SLOTS = 5
MAX_RANK = 70


def triton_form() -> Any:
    (found,) = [each for each in add_low_ranks.implementations["cuda"] if each.name == "triton"]
    return found.run


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    def empty(shape: tuple[int, ...], **options: Any) -> Tensor:
        return torch.full(
            shape, float("nan") if options["dtype"].is_floating_point else -7, **options
        )

    monkeypatch.setattr(torch, "empty", empty)


def part_of(rank: int, inputs: int, first: int, count: int, dtype: torch.dtype) -> LowRankPart:
    down = torch.randn(rank, inputs) / inputs**0.5
    return LowRankPart(down.to(dtype), torch.randn(count, rank).to(dtype), first)


def table_of(ranks: list[int], inputs: int, sizes: list[int], dtype: torch.dtype) -> AdapterTable:
    """An adapter for each rank, in slots from the last on; each changes one output range less. The
    table has another projection before this one and behind it."""
    made = AdapterTable(SLOTS, MAX_RANK, [1, len(sizes), 2], torch.device("cpu"))
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    for index, rank in enumerate(ranks):
        spans = [*zip(starts, sizes, strict=True)][index % len(sizes) :]
        parts = tuple(part_of(rank, inputs, first, count, dtype) for first, count in spans)
        made.set(SLOTS - 1 - index, [(), parts, ()])
    return made


def adapters_of(
    ranks: list[int], inputs: int, sizes: list[int], dtype: torch.dtype
) -> SlottedParts:
    return table_of(ranks, inputs, sizes, dtype).at[1]


def assert_same(projected: Tensor, hidden: Tensor, slots: Tensor, adapters: SlottedParts) -> None:
    grouped = group_by_adapter.reference(slots)
    doubled = projected.double(), hidden.double()
    exact = add_low_ranks.reference(*doubled, grouped, _doubled(adapters))
    found = triton_form()(projected, hidden, grouped, adapters)
    assert found is projected
    precision = {torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}[projected.dtype]
    torch.testing.assert_close(found.double(), exact, atol=precision, rtol=precision)


def _doubled(adapters: SlottedParts) -> SlottedParts:
    doubled = SlottedParts(adapters.table, MAX_RANK)
    doubled.parts = {
        slot: tuple(LowRankPart(p.down.double(), p.up.double(), p.first) for p in parts)
        for slot, parts in adapters.parts.items()
    }
    return doubled


@settings(max_examples=8, deadline=None)
@given(
    ranks=st.lists(st.sampled_from([1, 3, 8, 16, 20, 33, 64]), min_size=0, max_size=3),
    slots=st.lists(st.integers(-1, SLOTS - 1), max_size=9),
    inputs=st.sampled_from([8, 48, 1100]),
    sizes=st.sampled_from([[24], [16, 8, 8], [130, 30], [7, 9]]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_tokens_go_through_their_own_adapters(
    ranks: list[int], slots: list[int], inputs: int, sizes: list[int], dtype: torch.dtype
) -> None:
    adapters = adapters_of(ranks, inputs, sizes, dtype)
    hidden = torch.full((len(slots), inputs + 3), float("nan"))[:, :inputs]
    hidden = hidden.copy_(torch.randn(hidden.shape)).to(dtype)
    projected = torch.randn(len(slots), sum(sizes) + 5).to(dtype)[:, :-5]
    assert_same(projected, hidden, torch.tensor(slots, dtype=torch.int32), adapters)


def test_many_tokens_share_programs() -> None:
    adapters = adapters_of([8, 40], 48, [16, 8], torch.float16)
    slots = torch.tensor([-1] * 70 + [4] * 100 + [3] * 60 + [-1, 3, 4, 4] * 20, dtype=torch.int32)
    assert module._division(len(slots)).shrunk_rows > 1
    projected, hidden = torch.randn(len(slots), 24).half(), torch.randn(len(slots), 48).half()
    assert_same(projected, hidden, slots, adapters)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(-1, 300), max_size=400))
def test_tokens_of_an_adapter_are_put_together(slots: list[int]) -> None:
    (form,) = [each for each in group_by_adapter.implementations["cuda"] if each.name == "triton"]
    given = torch.tensor(slots, dtype=torch.int32)
    order, sorted_slots = form.run(given).tolist()
    assert sorted(order) == [*range(len(slots))]
    assert sorted_slots == [slots[token] for token in order]
    with_one = [slot for slot in sorted_slots if slot >= 0]
    assert with_one == sorted(with_one)
    assert sorted_slots[: len(with_one)] == with_one
    assert torch.equal(form.run(given), group_by_adapter.reference(given))


@pytest.mark.parametrize("tokens", [5, 12, 70, 300, 520])
def test_however_tokens_are_divided_each_goes_through_its_own(tokens: int) -> None:
    adapters = adapters_of([8, 40], 48, [16, 8], torch.bfloat16)
    slots = torch.randint(-1, SLOTS, (tokens,), dtype=torch.int32)
    hidden, projected = torch.randn(tokens, 48).bfloat16(), torch.randn(tokens, 24).bfloat16()
    assert_same(projected, hidden, slots, adapters)


@pytest.mark.parametrize("tokens", [5, 300])
def test_tokens_without_an_adapter_stay_as_they_are(tokens: int) -> None:
    adapters = adapters_of([8], 48, [16], torch.bfloat16)
    projected = torch.randn(tokens, 16).bfloat16()
    before = projected.clone()
    grouped = group_by_adapter.reference(torch.full((tokens,), -1, dtype=torch.int32))
    found = triton_form()(projected, torch.randn(tokens, 48).bfloat16(), grouped, adapters)
    assert torch.equal(found, before)


def test_an_adapter_that_left_changes_nothing_and_the_next_in_its_slot_does() -> None:
    table = table_of([8, 8], 48, [16], torch.float32)
    adapters = table.at[1]
    hidden, slots = torch.randn(3, 48), torch.tensor([4, 3, 4], dtype=torch.int32)
    grouped = group_by_adapter.reference(slots)
    table.set(4, [(), (), ()])
    projected = torch.zeros(3, 16)
    triton_form()(projected, hidden, grouped, adapters)
    assert not projected[[0, 2]].any()
    assert projected[1].any()
    new = part_of(20, 48, 4, 8, torch.float32)
    table.set(4, [(), (new,), ()])
    rows = torch.tensor([0, 2])
    expected = add_low_rank.reference(projected.clone(), hidden, rows, new)
    table.set(3, [(), (), ()])
    torch.testing.assert_close(triton_form()(projected, hidden, grouped, adapters), expected)
