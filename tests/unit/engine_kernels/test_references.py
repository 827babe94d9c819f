"""The references of the ops are held to their definitions, written out in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from services.engine.core.kernels import (
    AttentionMetadata,
    KVLayer,
    add_rms_norm,
    paged_attention,
    rms_norm,
    rotary_embedding,
    silu_and_mul,
    write_kv,
)

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-2}
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "bfloat16"])


def assert_close(found: Tensor, exact: Tensor) -> None:
    tolerance = TOLERANCE[found.dtype]
    torch.testing.assert_close(found.double(), exact, atol=tolerance, rtol=tolerance)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@dtypes
def test_rms_norm_divides_by_the_root_mean_square(dtype: torch.dtype) -> None:
    hidden, weight = random(5, 24, dtype=dtype), random(24, dtype=dtype)
    wide = hidden.double()
    exact = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    assert_close(rms_norm(hidden, weight, 1e-5), exact)


@dtypes
def test_add_rms_norm_normalises_the_sum_and_returns_it(dtype: torch.dtype) -> None:
    hidden, residual = random(5, 24, dtype=dtype), random(5, 24, dtype=dtype)
    weight = random(24, dtype=dtype)
    wide = hidden.double() + residual.double()
    exact = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    normalised, total = add_rms_norm(hidden, residual, weight, 1e-5)
    assert_close(total, wide)
    assert_close(normalised, exact)


@dtypes
def test_silu_and_mul_gates_the_second_half_by_the_first(dtype: torch.dtype) -> None:
    gate_up = random(7, 20, dtype=dtype)
    gate, up = gate_up.double().chunk(2, -1)
    before = gate_up.clone()
    assert_close(silu_and_mul(gate_up), gate / (1 + (-gate).exp()) * up)
    assert torch.equal(gate_up, before)


@pytest.mark.parametrize("rotary_dim", [16, 8])
@dtypes
def test_rotary_embedding_turns_pairs_of_halves(dtype: torch.dtype, rotary_dim: int) -> None:
    heads, half = random(4, 3, 16, dtype=dtype), rotary_dim // 2
    angles = torch.rand(4, 1, half, dtype=torch.float64) * 6
    cos = torch.cat((angles.cos(), angles.cos()), -1)
    sin = torch.cat((-angles.sin(), angles.sin()), -1)
    pairs = torch.complex(
        heads[..., :half].double(), heads[..., half:rotary_dim].double()
    ) * torch.polar(torch.ones_like(angles), angles)
    exact = torch.cat((pairs.real, pairs.imag, heads[..., rotary_dim:].double()), -1)
    assert_close(rotary_embedding(heads, cos.to(dtype), sin.to(dtype)), exact)


def test_write_kv_fills_exactly_its_slots() -> None:
    key_cache, value_cache = torch.zeros(6, 4, 2, 8), torch.zeros(6, 4, 2, 8)
    keys, values, slots = random(3, 2, 8), random(3, 2, 8), torch.tensor([21, 0, 7])
    write_kv(keys, values, KVLayer(key_cache, value_cache), slots)
    for cache, new in ((key_cache, keys), (value_cache, values)):
        expected = torch.zeros(24, 2, 8)
        for row, slot in enumerate(slots.tolist()):
            expected[slot] = new[row]
        assert torch.equal(cache.view(24, 2, 8), expected)


def attend_token_by_token(
    queries: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    metadata: AttentionMetadata,
    window: int | None = None,
    global_tokens: int = 0,
) -> Tensor:
    """The definition: softmax(q k / sqrt(d)) v over the keys that a query sees, in float64."""
    size, (heads, head_dim) = metadata.block_size, queries.shape[1:]
    per_kv, rows = heads // key_cache.shape[2], []
    for index, (new, context) in enumerate(
        zip(metadata.query_lengths, metadata.context_lengths, strict=True)
    ):
        table = metadata.block_tables[index].tolist()
        where = [table[at // size] * size + at % size for at in range(context)]
        keys = key_cache.flatten(0, 1)[where].double().repeat_interleave(per_kv, 1)
        values = value_cache.flatten(0, 1)[where].double().repeat_interleave(per_kv, 1)
        for position in range(context - new, context):
            query = queries[len(rows)].double()
            first = 0 if window is None else max(0, position - window + 1)
            seen = [at for at in range(position + 1) if at >= first or at < global_tokens]
            scores = torch.einsum("hd,khd->hk", query, keys[seen])
            weights = (scores / math.sqrt(head_dim)).softmax(-1)
            rows.append(torch.einsum("hk,khd->hd", weights, values[seen]))
    return torch.stack(rows)


lengths = st.tuples(st.integers(1, 50), st.integers(0, 200)) | st.tuples(
    st.just(1), st.integers(0, 200)
)


@dtypes
@settings(max_examples=40, deadline=None)
@given(
    sequences=st.lists(lengths, min_size=1, max_size=6),
    heads=st.sampled_from([(1, 1), (4, 4), (6, 2), (8, 1)]),
    block_size=st.sampled_from([1, 4, 16]),
    pattern=st.sampled_from([(None, 0), (1, 0), (20, 0), (20, 1), (7, 40), (None, 3)]),
)
def test_paged_attention_is_attention_over_each_sequences_own_past(
    dtype: torch.dtype,
    sequences: list[tuple[int, int]],
    heads: tuple[int, int],
    block_size: int,
    pattern: tuple[int | None, int],
) -> None:
    num_heads, kv_heads = heads
    contexts = tuple(new + past for new, past in sequences)
    needed = [-(-context // block_size) for context in contexts]
    order = (torch.randperm(sum(needed)) + 1).tolist()
    tables = torch.zeros(len(sequences), max(needed), dtype=torch.int32)
    for row, count in enumerate(needed):
        tables[row, :count] = torch.tensor([order.pop() for _ in range(count)])
    metadata = AttentionMetadata(tuple(new for new, _ in sequences), contexts, tables, block_size)
    shape = (sum(needed) + 1, block_size, kv_heads, 8)
    key_cache, value_cache = random(*shape, dtype=dtype), random(*shape, dtype=dtype)
    queries = random(sum(metadata.query_lengths), num_heads, 8, dtype=dtype)
    window, global_tokens = pattern
    found = paged_attention(
        queries, KVLayer(key_cache, value_cache), metadata, 8**-0.5, window, None, global_tokens
    )
    exact = attend_token_by_token(queries, key_cache, value_cache, metadata, *pattern)
    assert_close(found, exact)
