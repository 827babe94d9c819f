"""Mixtures of experts of few bits in Triton are their reference, whoever is chosen."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from services.engine.core.kernels import GroupedMatrix, grouped_mixture_of_experts
from services.engine.core.kernels.triton.experts_grouped import grouped_mixture_of_experts_triton
from tests.unit.engine_gpu.test_linear import assert_close, random_matrix

EXPERTS, SIZE, INTERMEDIATE = 3, 96, 64


def stack(outputs: int, inputs: int, bits: int, *, has_minima: bool = True) -> GroupedMatrix:
    found = GroupedMatrix.stack(
        [random_matrix(outputs, inputs, bits, has_minima=has_minima) for _ in range(EXPERTS)]
    )
    assert found is not None
    return found


def check(tokens: int, per_token: int, *stacks: Tensor | GroupedMatrix, ids: Tensor | None) -> None:
    hidden = torch.randn(tokens, SIZE).bfloat16() / 8
    chosen = torch.rand(tokens, EXPERTS).topk(per_token)
    weights = chosen.values.bfloat16()
    arguments = hidden, *stacks, chosen.indices if ids is None else ids, weights
    found = grouped_mixture_of_experts_triton(*arguments)  # type: ignore[arg-type]
    expected = grouped_mixture_of_experts.reference(*arguments)  # type: ignore[arg-type]
    assert_close(found, expected, roundings=3)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("has_minima", [True, False])
@pytest.mark.parametrize(("tokens", "per_token"), [(1, 2), (7, 1), (30, 2)])
def test_each_token_goes_through_its_experts(
    bits: int, has_minima: bool, tokens: int, per_token: int
) -> None:
    gate_up = stack(2 * INTERMEDIATE, SIZE, bits, has_minima=has_minima)
    check(tokens, per_token, gate_up, stack(SIZE, INTERMEDIATE, bits), ids=None)


def test_one_expert_may_get_all_rows() -> None:
    stacks = stack(2 * INTERMEDIATE, SIZE, 4), stack(SIZE, INTERMEDIATE, 4)
    check(20, 1, *stacks, ids=torch.full((20, 1), 1))


def test_one_stack_may_be_of_floats() -> None:
    down = torch.randn(EXPERTS, SIZE, INTERMEDIATE).bfloat16() / 8
    check(3, 2, stack(2 * INTERMEDIATE, SIZE, 4), down, ids=None)


def test_no_tokens_give_no_rows() -> None:
    stacks = stack(2 * INTERMEDIATE, SIZE, 4), stack(SIZE, INTERMEDIATE, 4)
    ids, weights = torch.empty(0, 2, dtype=torch.int64), torch.empty(0, 2).bfloat16()
    found = grouped_mixture_of_experts_triton(
        torch.empty(0, SIZE).bfloat16(), *stacks, ids, weights
    )
    assert found.shape == (0, SIZE)
