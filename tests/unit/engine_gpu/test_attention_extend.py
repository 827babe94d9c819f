"""Attention of many queries per sequence, on a GPU, and of steps in which some have few."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional

from services.engine.core.kernels.triton import attention
from services.engine.core.kernels.triton.attention import FEW_QUERIES, paged_attention_triton
from tests.fakes.paged_attention import PagedStep, Pattern, Shape
from tests.unit.engine_gpu.attention_cases import (
    BF16,
    FORMATS,
    PATTERNS,
    assert_close,
    check,
)

pytestmark = pytest.mark.usefixtures("unwritten_is_no_number")
chunk = st.tuples(st.integers(1, 200), st.integers(0, 300))
decode = st.tuples(st.just(1), st.integers(0, 300))


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    sequences=st.lists(chunk | decode, min_size=1, max_size=4),
    ratio=st.sampled_from([(1, 1), (4, 2), (3, 1), (7, 1), (16, 1)]),
    head_dim=st.sampled_from([16, 48]),
    block_size=st.sampled_from([1, 4, 16, 32, 256]),
    formats=st.sampled_from(FORMATS),
    pattern=st.sampled_from(PATTERNS),
    is_bounded=st.booleans(),
)
def test_every_query_sees_its_own_past(
    sequences: list[tuple[int, int]],
    ratio: tuple[int, int],
    head_dim: int,
    block_size: int,
    formats: tuple[torch.dtype, torch.dtype],
    pattern: Pattern,
    is_bounded: bool,
) -> None:
    step = PagedStep.random(Shape(*ratio, head_dim, block_size, *formats), sequences)
    exact = step.exact(pattern)
    step = step.poisoned(pattern)
    if is_bounded:
        step = step.bounded(256, 1000)
    assert_close(step.attended(paged_attention_triton, pattern), exact)


@pytest.mark.parametrize(
    "pattern", [Pattern(), Pattern(window=60), Pattern(window=20, global_tokens=5)]
)
def test_masks_begin_and_end_wherever_tiles_do(pattern: Pattern) -> None:
    step = PagedStep.random(Shape(1, 1, 16), [(20, past) for past in range(60, 77)])
    exact = step.exact(pattern)
    assert_close(step.poisoned(pattern).attended(paged_attention_triton, pattern), exact)


def test_more_heads_to_a_kv_head_than_rows_to_a_tile() -> None:
    step = PagedStep.random(Shape(136, 1, 16), [(20, 20), (1, 3)])
    check(step)


def test_many_sequences_find_their_tiles() -> None:
    news, pasts = torch.randint(1, 60, (33,)).tolist(), torch.randint(0, 60, (33,)).tolist()
    step = PagedStep.random(Shape(2, 1, 16), list(zip(news, pasts, strict=True)))
    check(step)


@pytest.mark.parametrize(
    ("lengths", "kernels"),
    [
        ([1, 1, FEW_QUERIES], ["few"]),
        ([FEW_QUERIES + 1, 64], ["many"]),
        ([1, 64, 2], ["few", "many"]),
    ],
)
def test_a_step_runs_the_kernels_that_its_lengths_need(
    lengths: list[int], kernels: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    for kind in ("few", "many"):
        monkeypatch.setattr(attention, f"attend_{kind}", lambda *args, kind=kind: ran.append(kind))
    step = PagedStep.random(Shape(2, 1, 16), [(new, 10) for new in lengths])
    step.attended(paged_attention_triton, Pattern())
    assert ran == kernels
    # Of bounds it is the greatest alone that says something.
    ran.clear()
    step.bounded(max(lengths), 100).attended(paged_attention_triton, Pattern())
    assert ran == (["few"] if max(lengths) <= FEW_QUERIES else ["few", "many"])


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("sequences", [[(8192, 0)], [(2048, 30720)], [(512, 4096), (1, 1000)] * 8])
def test_a_gpu_computes_what_torch_does_over_long_contexts(
    sequences: list[tuple[int, int]], head_dim: int
) -> None:
    shape = Shape(16, 4, head_dim, 16, BF16, BF16)
    step = PagedStep.random(shape, sequences, device="cuda")
    found, row = step.attended(paged_attention_triton, Pattern()), 0
    for index, (new, past) in enumerate(sequences):
        context = new + past
        blocks = step.metadata.block_tables[index, : -(-context // 16)].long()
        keys, values = (
            stored[blocks].flatten(0, 1)[:context].transpose(0, 1).unsqueeze(0)
            for stored in (step.cache.keys, step.cache.values)
        )
        seen = torch.ones(new, context, dtype=torch.bool, device="cuda").tril(past)
        exact = functional.scaled_dot_product_attention(
            step.queries[row : row + new].transpose(0, 1).unsqueeze(0),
            keys,
            values,
            attn_mask=seen,
            scale=shape.scale,
            enable_gqa=True,
        )
        expected = exact.squeeze(0).transpose(0, 1)
        torch.testing.assert_close(found[row : row + new], expected, atol=1e-2, rtol=2e-2)
        row += new
