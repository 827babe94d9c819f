"""Attention of few queries per sequence, on a GPU: it is the reference's, however it is divided."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional

from services.engine.core.kernels.triton import attention_tiles
from services.engine.core.kernels.triton.attention import FEW_QUERIES, paged_attention_triton
from services.engine.core.kernels.triton.attention_tiles import Card, decode_splits, decode_tiles
from tests.fakes.paged_attention import PagedStep, Pattern, Shape
from tests.unit.engine_gpu.attention_cases import (
    BF16,
    F32,
    FORMATS,
    FP8,
    INT8,
    PATTERNS,
    assert_close,
    check,
)

pytestmark = pytest.mark.usefixtures("unwritten_is_no_number")
RATIOS = [(1, 1), (2, 2), (4, 2), (3, 1), (4, 1), (14, 2), (8, 1), (16, 1)]


few = st.tuples(st.integers(1, FEW_QUERIES), st.integers(0, 300)) | st.tuples(
    st.just(1), st.integers(0, 300)
)


@settings(max_examples=18, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    sequences=st.lists(few, min_size=1, max_size=4),
    ratio=st.sampled_from(RATIOS),
    head_dim=st.sampled_from([16, 48, 64]),
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
        step = step.bounded(FEW_QUERIES, 1000)
    assert_close(step.attended(paged_attention_triton, pattern), exact)


@pytest.mark.parametrize("pattern", [Pattern(window=50), Pattern(window=33, global_tokens=70)])
def test_hidden_tiles_are_skipped_wherever_the_window_begins(pattern: Pattern) -> None:
    step = PagedStep.random(Shape(1, 1, 64), [(1, past) for past in range(220, 480, 13)])
    exact = step.exact(pattern)
    assert_close(step.poisoned(pattern).attended(paged_attention_triton, pattern), exact)


def test_wider_heads_and_odd_blocks_are_left_to_the_reference() -> None:
    for shape in (Shape(2, 1, 512), Shape(2, 1, 16, block_size=24)):
        step = PagedStep.random(shape, [(1, 90), (5, 0)])
        check(step)


def test_a_long_sequence_among_many_is_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Card, "of", lambda device: Card(90, 1))
    monkeypatch.setattr(attention_tiles, "LONGEST_PART_TOKENS", 256)
    step = PagedStep.random(Shape(2, 2, 64), [(1, 1000), (1, 255), (1, 256), (4, 0)])
    tiles = decode_tiles(Card(90, 1), 64, F32, 1)
    splits, least_tiles = decode_splits(Card(90, 1), 8, -(-1001 // tiles.tokens), tiles)
    assert splits == 4
    assert least_tiles * tiles.tokens == 256
    check(step)


def test_an_empty_card_is_filled_and_a_full_one_left_alone() -> None:
    card = Card(90, 132)
    tiles = decode_tiles(card, 128, BF16, 4)
    num_tiles = 8192 // tiles.tokens
    alone, _ = decode_splits(card, 8, num_tiles, tiles)
    assert 8 * alone >= 2 * card.num_multiprocessors
    assert decode_splits(card, 8 * 256, 1, tiles)[0] == 1
    for programs in (8, 24, 100, 264, 400):
        splits, _ = decode_splits(card, programs, num_tiles, tiles)
        places = tiles.resident * card.num_multiprocessors
        waves = programs * splits / places
        assert waves / -(-programs * splits // places) > 0.75


def test_padding_is_a_sequence_like_any_other() -> None:
    """Its only token is in the cache's last block, and several may be the same."""
    step = PagedStep.random(Shape(4, 2, 32), [(1, 70), (1, 0), (1, 0), (1, 0)])
    tables = step.metadata.block_tables
    tables[1:, 0] = len(step.cache.keys) - 1
    exact = step.exact(Pattern())
    assert_close(step.bounded(1, 4096).attended(paged_attention_triton, Pattern()), exact)


def test_layers_of_one_memory_are_read_by_their_own_strides() -> None:
    step = PagedStep.random(Shape(4, 2, 32), [(1, 70), (3, 9)])
    memory = torch.full((*step.cache.keys.shape[:2], 2, *step.cache.keys.shape[2:]), float("nan"))
    keys, values = memory.unbind(2)
    keys.copy_(step.cache.keys)
    values.copy_(step.cache.values)
    cache = replace(step.cache, keys=keys, values=values)
    assert not cache.keys.is_contiguous()
    found = replace(step, cache=cache).attended(paged_attention_triton, Pattern())
    assert_close(found, step.exact(Pattern()))


@pytest.mark.gpu
@pytest.mark.parametrize("kv_dtype", [BF16, FP8, INT8])
@pytest.mark.parametrize(
    ("batch", "context"), [(1, 8192), (1, 32768), (16, 8192), (64, 32768), (256, 8192), (256, 500)]
)
def test_a_gpu_computes_what_torch_does_over_long_contexts(
    batch: int, context: int, kv_dtype: torch.dtype
) -> None:
    shape = Shape(32, 8, 128, 16, BF16, kv_dtype)
    pasts = torch.randint(context // 2, context, (batch,)).tolist()
    step = PagedStep.random(shape, [(1, past) for past in pasts], device="cuda")
    found = step.bounded(1, 2 * context).attended(paged_attention_triton, Pattern())
    for row, length in enumerate(step.metadata.context_lengths):
        blocks = step.metadata.block_tables[row, : -(-length // 16)].long()
        keys, values = (
            (stored[blocks].float() * (1.0 if scales is None else scales[blocks].unsqueeze(-1)))
            .flatten(0, 1)[:length]
            .transpose(0, 1)
            .to(BF16)
            for stored, scales in (
                (step.cache.keys, step.cache.key_scales),
                (step.cache.values, step.cache.value_scales),
            )
        )
        exact = functional.scaled_dot_product_attention(
            step.queries[row].unsqueeze(1), keys, values, scale=shape.scale, enable_gqa=True
        )
        torch.testing.assert_close(found[row], exact.squeeze(1), atol=1e-2, rtol=2e-2)


@pytest.mark.gpu
def test_a_captured_step_runs_again_with_other_lengths() -> None:
    shape = Shape(32, 8, 128, 16, BF16, BF16)
    step = PagedStep.random(shape, [(1, 3000)] * 8, device="cuda").bounded(1, 4096)
    step.attended(paged_attention_triton, Pattern())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step.attended(paged_attention_triton, Pattern())
    for contexts in ([1, 5, 3001, 64, 65, 2000, 16, 17], [7] * 8):
        step.metadata.device_lengths.contexts.copy_(torch.tensor(contexts))
        graph.replay()
        exact = step.exact(Pattern())
        torch.testing.assert_close(found.float(), exact, atol=1e-2, rtol=2e-2)
