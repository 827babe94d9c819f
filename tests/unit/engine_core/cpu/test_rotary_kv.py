"""The native rotary embedding, which also writes a step's keys and values to the cache."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import rms_norm

from services.engine.core.kernels import rotary_embedding
from services.engine.core.kernels.cpu.attention import Step, rotary_kv
from services.engine.core.kernels.cpu.kv_cache import KvFormat, PackedKVCache
from services.engine.core.kernels.cpu.library import Library
from services.engine.core.kernels.cpu.team import Team
from tests.fakes.paged_step import NAN_BYTE, libraries

KERNELS = libraries()
pytestmark = pytest.mark.skipif(not KERNELS, reason="no native kernels on this machine")

HEADS, KV_HEADS = 3, 2
LENGTH = 21  # tokens, more than one tile and more than one task


def angles(rotary_dim: int, amplitude: float = 1.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines of LENGTH positions, [LENGTH, rotary_dim / 2]."""
    frequencies = 0.5 ** torch.arange(rotary_dim // 2)
    angle = torch.arange(LENGTH).view(-1, 1) * frequencies
    return angle.cos() * amplitude, angle.sin() * amplitude


def rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """What the reference makes of [LENGTH, n, head_dim]."""
    both = torch.cat((cos, cos), 1).unsqueeze(1), torch.cat((-sin, sin), 1).unsqueeze(1)
    return rotary_embedding(heads, *both)


def write(
    kernels: Library, cache: PackedKVCache, qkv: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """Run the kernel for one sequence; return the keys and values that the cache then holds."""
    table = torch.tensor([[3, 1]])
    step = Step.of([LENGTH], [LENGTH], table, cache.block_size)
    rotary_kv(Team(kernels, 2), step, cache, [0], qkv, HEADS, cos, sin)
    return cache.read(0, step.slots)


@given(
    kernels=st.sampled_from(KERNELS or [None]),
    head_dim=st.integers(1, 16).map(lambda n: 16 * n),
    unrotated=st.integers(0, 14).map(lambda n: 2 * n),
    block_size=st.sampled_from([16, 32]),
    seed=st.integers(0, 1_000),
)
@settings(max_examples=30, deadline=None)
def test_queries_and_keys_are_rotated_and_values_are_not(
    kernels: Library, head_dim: int, unrotated: int, block_size: int, seed: int
) -> None:
    torch.manual_seed(seed)
    cos, sin = angles(max(2, head_dim - unrotated), amplitude=1.2)
    cache = PackedKVCache(1, 4, block_size, KV_HEADS, head_dim)
    cache.fill(NAN_BYTE)
    # Rows of a wider buffer, whose other columns are somebody else's.
    buffer = torch.randn(LENGTH, (HEADS + 2 * KV_HEADS) * head_dim + 5)
    qkv = buffer[:, : (HEADS + 2 * KV_HEADS) * head_dim]
    before = buffer.clone()
    heads = qkv.unflatten(1, (-1, head_dim)).clone()
    expected = rotated(heads[:, : HEADS + KV_HEADS], cos, sin)

    keys, values = write(kernels, cache, qkv, cos, sin)

    after = qkv.unflatten(1, (-1, head_dim))
    torch.testing.assert_close(after[:, : HEADS + KV_HEADS], expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(after[:, HEADS + KV_HEADS :], heads[:, HEADS + KV_HEADS :])
    assert torch.equal(buffer[:, qkv.shape[1] :], before[:, qkv.shape[1] :])
    # The cache holds what the buffer holds, rounded to the nearest bf16.
    assert torch.equal(keys, after[:, HEADS : HEADS + KV_HEADS].bfloat16().float())
    assert torch.equal(values, after[:, HEADS + KV_HEADS :].bfloat16().float())


@pytest.mark.parametrize("kernels", KERNELS, ids=lambda each: each.isa)
def test_int8_is_within_half_a_step_of_a_vectors_largest_element(kernels: Library) -> None:
    cos, sin = angles(32)
    cache = PackedKVCache(1, 4, 16, KV_HEADS, 32, KvFormat.INT8)
    cache.fill(NAN_BYTE)
    qkv = torch.randn(LENGTH, (HEADS + 2 * KV_HEADS) * 32)
    qkv[4] = 0.0
    qkv[5] *= 1e-35
    qkv[6] *= 1e30

    keys, values = write(kernels, cache, qkv, cos, sin)

    stored = torch.cat((keys, values), 1)
    exact = qkv.unflatten(1, (-1, 32))[:, HEADS:]
    step = exact.abs().amax(-1, keepdim=True) / 127
    assert ((stored - exact).abs() <= step * 0.5001 + 1e-30).all()


@pytest.mark.parametrize("kernels", KERNELS, ids=lambda each: each.isa)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_a_vector_that_is_not_finite_is_not_made_finite(kernels: Library, poison: float) -> None:
    # Else a broken request would answer with nonsense instead of failing.
    cos, sin = angles(32)
    for kv_format in KvFormat:
        cache = PackedKVCache(1, 4, 16, KV_HEADS, 32, kv_format)
        qkv = torch.randn(LENGTH, (HEADS + 2 * KV_HEADS) * 32)
        qkv[7, HEADS * 32 + 3] = poison
        qkv[9, -1] = poison
        keys, values = write(kernels, cache, qkv, cos, sin)
        assert (~keys.isfinite()).any(-1).nonzero().tolist() == [[7, 0]]
        assert (~values.isfinite()).any(-1).nonzero().tolist() == [[9, KV_HEADS - 1]]


@pytest.mark.parametrize("kernels", KERNELS, ids=lambda each: each.isa)
@pytest.mark.parametrize("head_dim", [16, 48, 64, 128, 256])
def test_queries_and_keys_are_normed_by_head_before_they_are_rotated(
    kernels: Library, head_dim: int
) -> None:
    torch.manual_seed(head_dim)
    cos, sin = angles(head_dim)
    cache = PackedKVCache(1, 4, 16, KV_HEADS, head_dim)
    qkv = torch.randn(LENGTH, (HEADS + 2 * KV_HEADS) * head_dim) * 3
    query_norm, key_norm = torch.rand(2, head_dim) + 0.5
    heads = qkv.unflatten(1, (-1, head_dim)).clone()
    normed = torch.cat(
        (
            rms_norm(heads[:, :HEADS], (head_dim,), query_norm, 1e-3),
            rms_norm(heads[:, HEADS : HEADS + KV_HEADS], (head_dim,), key_norm, 1e-3),
        ),
        1,
    )
    expected = rotated(normed, cos, sin)
    step = Step.of([LENGTH], [LENGTH], torch.tensor([[3, 1]]), 16)
    norms = (query_norm, key_norm, 1e-3)

    rotary_kv(Team(kernels, 2), step, cache, [0], qkv, HEADS, cos, sin, norms)

    after = qkv.unflatten(1, (-1, head_dim))
    torch.testing.assert_close(after[:, : HEADS + KV_HEADS], expected, rtol=2e-6, atol=2e-6)
    assert torch.equal(after[:, HEADS + KV_HEADS :], heads[:, HEADS + KV_HEADS :])
    keys, _ = cache.read(0, step.slots)
    assert torch.equal(keys, after[:, HEADS : HEADS + KV_HEADS].bfloat16().float())
