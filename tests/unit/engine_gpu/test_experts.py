"""Mixtures of experts give what the reference gives, whichever experts tokens choose."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from services.engine.core.kernels import choose_experts, mixture_of_experts
from services.engine.core.kernels.triton import experts as module
from services.engine.core.kernels.triton import experts_routing as routing


def triton_form() -> Any:
    (found,) = [
        each for each in mixture_of_experts.implementations["cuda"] if each.name == "triton"
    ]
    return found.run


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not written is NaN, or a number that leads nowhere."""

    def empty(shape: Any, dtype: torch.dtype, device: Any) -> Tensor:
        value = float("nan") if dtype.is_floating_point else -(2**30)
        return torch.full(shape if isinstance(shape, tuple) else (shape,), value, dtype=dtype)

    monkeypatch.setattr(torch, "empty", empty)


def step(
    tokens: int, experts: int, per_token: int, size: int, inner: int, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    ids = torch.stack([torch.randperm(experts)[:per_token] for _ in range(tokens)])
    hidden = torch.randn(tokens, size + 16)[:, :size].to(dtype)
    gate_up = (torch.randn(experts, 2 * inner, size) * 0.2).to(dtype)
    down = (torch.randn(experts, size, inner) * 0.2).to(dtype)
    return hidden, gate_up, down, ids, torch.rand(tokens, per_token).to(dtype)


def assert_same(arguments: tuple[Tensor, ...]) -> None:
    found = triton_form()(*arguments)
    exact = mixture_of_experts.reference(*(each.double() for each in arguments[:3]), *arguments[3:])
    assert found.dtype == arguments[0].dtype
    torch.testing.assert_close(found.double(), exact.double(), atol=0.05, rtol=0.03)


@settings(max_examples=6, deadline=None)
@given(
    tokens=st.integers(1, 30),
    experts=st.integers(1, 9),
    chosen=st.integers(1, 4),
    size=st.sampled_from([16, 48, 144]),
    inner=st.sampled_from([16, 40, 136]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
)
def test_experts_make_of_tokens_what_the_reference_makes_of_them(
    tokens: int, experts: int, chosen: int, size: int, inner: int, dtype: torch.dtype
) -> None:
    assert_same(step(tokens, experts, min(chosen, experts), size, inner, dtype))


@pytest.mark.parametrize("rows", [16, 32, 96, 1000])
def test_every_size_of_tile(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them with blocks that are full, in part and not at all."""
    monkeypatch.setattr(module, "_tiles", lambda _, device: sizes(rows))
    hidden, gate_up, down, _, shares = step(150, 4, 1, 32, 24, torch.bfloat16)
    ids = torch.tensor([0] * 128 + [2] * 20 + [3] * 2)[torch.randperm(150), None]
    assert_same((hidden, gate_up, down, ids, shares))


def sizes(rows: int) -> Any:
    return next((pair for most, *pair in module._TILES if rows <= most), module._LARGE_HOPPER)


def test_many_choices_are_put_in_order_by_many_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "_ONE_PROGRAM", 64)
    monkeypatch.setattr(routing, "_CHUNK", 32)
    assert_same(step(70, 7, 3, 32, 24, torch.bfloat16))


@pytest.mark.parametrize("one_program", [0, 4096])
def test_choices_are_ordered_by_expert_and_each_block_has_one(
    one_program: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routing, "_ONE_PROGRAM", one_program)
    ids = torch.randint(0, 6, (333,))
    ids[ids == 4] = 5
    order, table = routing.plan(ids, 6, 16)
    assert sorted(order.tolist()) == list(range(333))
    ordered = ids[order.long()]
    assert torch.equal(ordered, ids.sort().values)
    covered = []
    for expert, first, end in table.tolist():
        if expert < 6:
            rows = range(first, min(first + 16, end))
            assert rows
            assert set(ordered[rows.start : rows.stop].tolist()) == {expert}
            covered += rows
    assert covered == list(range(333))


@settings(max_examples=10, deadline=None)
@given(
    tokens=st.integers(0, 5),
    experts=st.sampled_from([1, 5, 8, 60, 128]),
    chosen=st.integers(1, 8),
    normalize=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_the_largest_logits_choose(
    tokens: int, experts: int, chosen: int, normalize: bool, dtype: torch.dtype
) -> None:
    per_token = min(chosen, experts)
    logits = torch.full((tokens, experts + 2), float("nan"), dtype=dtype)[:, :experts]
    for row in logits:  # no two alike: of those, anyone may come first
        row.copy_(torch.randperm(experts) / 8)
    (form,) = [each for each in choose_experts.implementations["cuda"] if each.name == "triton"]
    ids, shares = form.run(logits, per_token, normalize)
    expected_ids, expected_shares = choose_experts.reference(logits, per_token, normalize)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(shares, expected_shares, atol=1e-6, rtol=8e-3)


def test_a_token_that_nobody_is_beside() -> None:
    assert_same(step(1, 8, 2, 64, 32, torch.bfloat16))


def test_an_expert_without_a_share_adds_nothing() -> None:
    hidden, gate_up, down, ids, shares = step(5, 4, 2, 32, 24, torch.bfloat16)
    shares[:, 1] = 0
    alone = triton_form()(
        hidden, gate_up, down, ids[:, :1].contiguous(), shares[:, :1].contiguous()
    )
    both = triton_form()(hidden, gate_up, down, ids, shares)
    assert torch.equal(both, alone)
