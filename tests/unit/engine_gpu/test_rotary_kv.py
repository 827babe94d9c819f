"""Queries, keys and values go through one kernel as they go through the reference's many."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from services.engine.core.kernels import KVLayer, rotary_angles, rotary_kv
from services.engine.core.kv_cache import KVCache
from services.engine.core.layers import RotaryEmbedding
from services.engine.core.layers.rotary import rotary_frequencies
from services.engine.core.model_config import RopeConfig

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
FORMATS = [None, torch.int8, torch.float8_e4m3fn]
NUM_BLOCKS = 5


@dataclasses.dataclass(frozen=True)
class Shape:
    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int
    block_size: int
    has_norms: bool


SHAPES = st.builds(
    lambda groups, kv_heads, head_dim, rotated, block_size, has_norms: Shape(
        groups * kv_heads,
        kv_heads,
        head_dim,
        int(head_dim * rotated) // 2 * 2,
        block_size,
        has_norms,
    ),
    st.integers(1, 4),
    st.integers(1, 11),
    st.sampled_from([8, 16, 24, 64, 96, 128]),
    st.sampled_from([0.0, 0.25, 0.75, 1.0]),
    st.sampled_from([1, 4, 16]),
    st.booleans(),
)


def triton_form() -> Any:
    (found,) = [each for each in rotary_kv.implementations["cuda"] if each.name == "triton"]
    return found.run


def caches(shape: Shape, dtype: torch.dtype) -> tuple[KVCache, KVCache]:
    """Two caches of two layers, with the same things in them."""
    made = [
        KVCache(2, NUM_BLOCKS, shape.block_size, shape.kv_heads, shape.head_dim, dtype, "cpu")
        for _ in range(2)
    ]
    for layers in zip(made[0].layers, made[1].layers, strict=True):
        for name in ("keys", "values", "key_scales", "value_scales"):
            first, second = (getattr(layer, name) for layer in layers)
            if first is not None:
                first.copy_(torch.randint(0, 100, first.shape))
                second.copy_(first)
    return made[0], made[1]


def parts(layer: KVLayer) -> tuple[Tensor, ...]:
    named = (layer.keys, layer.values, layer.key_scales, layer.value_scales)
    return tuple(each for each in named if each is not None)


def assert_close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """But for the last bits of `dtype`, in which heads are computed: the reference rounds more
    often."""
    precision = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}[dtype]
    torch.testing.assert_close(found.float(), expected.float(), atol=precision, rtol=precision)


@settings(max_examples=12, deadline=None)
@given(
    shape=SHAPES,
    dtype=DTYPES,
    kept=st.sampled_from(FORMATS),
    num_tokens=st.integers(0, 4),
    gap=st.sampled_from([0, 16, 3]),
    seed=st.integers(0, 99),
)
def test_one_kernel_does_what_the_reference_does(
    shape: Shape, dtype: torch.dtype, kept: torch.dtype | None, num_tokens: int, gap: int, seed: int
) -> None:
    torch.manual_seed(seed)
    width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    whole = torch.full((num_tokens, width + gap), float("nan"), dtype=dtype)
    qkv = whole[:, :width].copy_(torch.randn(num_tokens, width))
    slots = torch.randperm(NUM_BLOCKS * shape.block_size)[:num_tokens]
    norms = torch.randn(2, shape.head_dim).to(dtype).unbind() if shape.has_norms else None
    angles = None
    if shape.rotary_dim:
        rope = RopeConfig(10_000.0, shape.rotary_dim)
        angles = RotaryEmbedding(rope, 64).angles(torch.randint(0, 64, (num_tokens,)), dtype)
    found_cache, expected_cache = caches(shape, kept or dtype)
    for layer in range(2):
        arguments = (slots, norms, 1e-5, angles)
        expected = rotary_kv.reference(qkv.clone(), expected_cache.layers[layer], *arguments)
        found = triton_form()(qkv, found_cache.layers[layer], *arguments)
        assert found.shape == (num_tokens, shape.heads, shape.head_dim)
        assert found.dtype == dtype
        assert_close(found, expected, dtype)
    written = torch.zeros(NUM_BLOCKS + 1, shape.block_size, dtype=torch.bool)
    written.view(-1)[slots] = True
    for ours, theirs in zip(found_cache.layers, expected_cache.layers, strict=True):
        for found, expected in zip(parts(ours), parts(theirs), strict=True):
            assert torch.equal(found[~written].float(), expected[~written].float())
        if kept is None:
            for found, expected in zip(parts(ours), parts(theirs), strict=True):
                assert_close(found, expected, dtype)
        else:
            assert_same_meaning(ours, theirs, written, dtype)


def assert_same_meaning(
    found: KVLayer, expected: KVLayer, written: Tensor, dtype: torch.dtype
) -> None:
    """What eight bits stand for differs by a step at most, and seldom by that."""
    for ours, theirs, own_scales, their_scales in (
        (found.keys, expected.keys, found.key_scales, expected.key_scales),
        (found.values, expected.values, found.value_scales, expected.value_scales),
    ):
        left, right = ours[written].float(), theirs[written].float()
        if own_scales is None or their_scales is None:
            assert ((left - right).abs() <= right.abs() / 8 + 2**-9).all()
        else:
            assert_close(own_scales[written], their_scales[written], dtype)
            assert ((left - right).abs() <= (1 if dtype == torch.float32 else 2)).all()
        if dtype == torch.float32 and left.numel():
            assert (left != right).float().mean() < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "rotary_dim"), [(0, 8), (1, 2), (5, 72), (3, 128)])
def test_angles_are_those_of_the_reference(
    tokens: int, rotary_dim: int, dtype: torch.dtype
) -> None:
    (form,) = [each for each in rotary_angles.implementations["cuda"] if each.name == "triton"]
    frequencies, _ = rotary_frequencies(RopeConfig(500_000.0, rotary_dim), 64)
    positions = torch.randint(0, 131072, (tokens,))
    for amplitude in (1.0, 1.19):
        found = form.run(positions, frequencies, amplitude, dtype)
        expected = rotary_angles.reference(positions, frequencies, amplitude, dtype)
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.dtype == dtype
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-2)


@pytest.mark.parametrize("value", [1e4, -1e4, 448.0, 2**-9, 2**-6, 0.0174, 0.0])
def test_eight_bit_floats_saturate_and_round_to_even(value: float) -> None:
    cache = KVCache(1, 1, 4, 1, 16, torch.float8_e4m3fn, "cpu").layers[0]
    row = torch.cat((torch.zeros(32), value * torch.linspace(0, 1, 16)))[None]
    triton_form()(row, cache, torch.tensor([2]), None, 0.0, None)
    expected = row[0, 32:].clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(cache.values[0, 2, 0].view(torch.uint8), expected.view(torch.uint8))
