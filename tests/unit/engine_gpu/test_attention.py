"""Attention on a GPU, of few queries and of many: whatever the heads, the card and the formats."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from services.engine.core.kernels.triton.attention import paged_attention_triton
from services.engine.core.kernels.triton.attention_tiles import Card
from tests.fakes.paged_attention import PagedStep, Pattern, Shape
from tests.unit.engine_gpu.attention_cases import FORMATS, assert_close, check

pytestmark = pytest.mark.usefixtures("unwritten_is_no_number")
FEW, MANY = [(1, 90), (5, 0), (2, 300)], [(90, 90), (40, 0), (1, 30)]


@pytest.mark.parametrize("sequences", [FEW, MANY])
@pytest.mark.parametrize("head_dim", [80, 96, 128, 192, 256])
def test_heads_may_have_any_multiple_of_16_dimensions(
    head_dim: int, sequences: list[tuple[int, int]]
) -> None:
    check(PagedStep.random(Shape(4, 2, head_dim), sequences))


@pytest.mark.parametrize("sequences", [[(1, 200), (3, 30)], [(70, 200), (20, 0)]])
@pytest.mark.parametrize("capability", [80, 86, 90])
def test_every_card_can_read_every_format(
    capability: int, sequences: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    card = Card(capability, 4)
    monkeypatch.setattr(Card, "of", lambda device: card)
    for formats in FORMATS:
        check(PagedStep.random(Shape(4, 2, 32, 16, *formats), sequences), Pattern(window=100))


@pytest.mark.parametrize("sequences", [FEW, MANY])
def test_a_sequence_may_have_no_tokens_in_a_step(sequences: list[tuple[int, int]]) -> None:
    check(PagedStep.random(Shape(4, 2, 16), [(0, 40), *sequences[:1], (0, 0), *sequences[1:]]))


def test_values_may_lie_otherwise_than_keys() -> None:
    step = PagedStep.random(Shape(4, 2, 16), FEW)
    values = torch.stack((step.cache.values, step.cache.keys), 2)[:, :, 0]
    found = replace(step, cache=replace(step.cache, values=values))
    assert_close(found.attended(paged_attention_triton, Pattern()), step.exact(Pattern()))
