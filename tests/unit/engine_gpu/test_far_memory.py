"""Kernels find elements that 32 bits do not count: caches and weights of a large card."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from services.engine.core.kernels.kv_layer import KVLayer
from services.engine.core.kernels.rotary_kv import rotary_kv
from services.engine.core.kernels.triton import experts, experts_grouped
from services.engine.core.kernels.triton.attention import paged_attention_triton
from services.engine.core.kernels.triton.attention_call import is_far
from services.engine.core.kernels.triton.rotary_kv import rotary_kv_triton
from tests.fakes.paged_attention import PagedStep, Pattern, Shape
from tests.fakes.sparse_memory import sparse

FAR = 1 << 31
F16, INT8 = torch.float16, torch.int8
# Of blocks, tokens and heads: each is the one that lies furthest apart.
LAYOUTS = {
    "blocks": lambda blocks, dim: (FAR // (blocks - 2), 4 * dim, dim, 1),
    "tokens": lambda blocks, dim: (4 * dim, FAR // 8, dim, 1),
    "heads": lambda blocks, dim: (16 * dim, dim, FAR // 2, 1),
}


def spread(stored: Tensor, layout: str) -> Tensor:
    """The same, far apart."""
    *strides, _ = LAYOUTS[layout](len(stored), stored.shape[-1])
    stride = (*(each // 16 * 16 for each in strides), 1)
    found = sparse(tuple(stored.shape), stride, stored.dtype)
    found.copy_(stored)
    return found


def spread_layer(layer: KVLayer, layout: str) -> KVLayer:
    return replace(layer, keys=spread(layer.keys, layout), values=spread(layer.values, layout))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kv_dtype", [F16, INT8])
@pytest.mark.parametrize("sequences", [[(1, 200), (3, 90)], [(40, 100)]])
def test_a_cache_is_read_wherever_it_lies(
    sequences: list[tuple[int, int]], kv_dtype: torch.dtype, layout: str
) -> None:
    step = PagedStep.random(Shape(6, 3, 16, 16, F16, kv_dtype), sequences)
    far = replace(step, cache=spread_layer(step.cache, layout))
    assert is_far(far.cache) == (layout != "heads")
    found = far.attended(paged_attention_triton, Pattern())
    assert torch.equal(found, step.attended(paged_attention_triton, Pattern()))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_cache_is_written_wherever_it_lies(layout: str) -> None:
    shape = (8, 16, 3, 16)
    near = KVLayer(torch.zeros(shape, dtype=F16), torch.zeros(shape, dtype=F16))
    far = spread_layer(near, layout)
    qkv, slots = torch.randn(3, 12 * 16).to(F16), torch.tensor([127, 3, 64])
    for run, layer in ((rotary_kv_triton, far), (rotary_kv.reference, near)):
        run(qkv, layer, slots, None, 0.0, None)
    assert torch.equal(far.keys, near.keys)
    assert torch.equal(far.values, near.values)


EXPERTS, SIZE, WIDTH = FAR // 512 + 9, 16, 16


def only(expert: int, rows: int) -> tuple[Tensor, Tensor]:
    """Rows in their own order, and a table that gives them all to an expert."""
    return torch.arange(rows, dtype=torch.int32), torch.tensor([[expert, 0, rows]]).int()


def test_the_weights_of_an_expert_are_found_wherever_they_lie() -> None:
    expert, rows = EXPERTS - 1, 5
    hidden = torch.randn(rows, SIZE).to(F16)
    weights = sparse((EXPERTS, 2 * WIDTH, SIZE), (2 * WIDTH * SIZE, SIZE, 1), F16)
    weights[expert] = torch.randn(2 * WIDTH, SIZE)
    order, table = only(expert, rows)
    inner = torch.full((rows, WIDTH), float("nan"), dtype=F16)
    tiles = {"block_rows": 16, "tile_columns": 16, "depth": 16, "group": 8, "is_early": False}
    shape = {"experts": EXPERTS, "size": SIZE, "intermediate": WIDTH} | tiles
    experts.gate_up_kernel[(1,)](
        hidden, weights, inner, order, table, 1, SIZE, per_token=1, **shape
    )
    gate, up = (hidden @ weights[expert].T).float().chunk(2, -1)
    expected = torch.nn.functional.silu(gate) * up
    torch.testing.assert_close(inner.float(), expected, atol=2e-2, rtol=1e-2)

    weights = sparse((2 * EXPERTS, SIZE, WIDTH), (SIZE * WIDTH, WIDTH, 1), F16)
    expert = 2 * EXPERTS - 1
    weights[expert] = torch.randn(SIZE, WIDTH)
    order, table = only(expert, rows)
    outer = torch.full((rows, SIZE), float("nan"), dtype=F16)
    ones = torch.ones(rows, dtype=F16)
    shape["experts"] = 2 * EXPERTS
    experts.down_kernel[(1,)](inner, weights, ones, outer, order, table, 1, **shape)
    expected = (inner @ weights[expert].T).float()
    torch.testing.assert_close(outer.float(), expected, atol=2e-2, rtol=1e-2)


def test_the_levels_of_an_expert_are_found_wherever_they_lie() -> None:
    count, inputs = FAR // (16 * 32) + 9, 32
    levels = sparse((count, 16, inputs), (16 * inputs, inputs, 1), torch.uint8)
    scales = sparse((count, 16, 1), (16, 1, 1), F16)
    levels[-1] = torch.randint(0, 256, (16, inputs))
    scales[-1] = torch.rand(16, 1) / 64
    hidden = torch.randn(5, inputs).to(F16)
    output = torch.full((5, 16), float("nan"), dtype=F16)
    order, table = only(count - 1, 5)
    experts_grouped.grouped_experts_kernel[(1, 1)](
        hidden, levels, scales, None, None, output, order, table, 1, 16, inputs, inputs, 1, inputs,
        experts=count, per_token=1, bits=8, group_size=32, is_whole=True,
        tile_rows=16, tile_outputs=16, tile_inputs=32, is_early=False,
    )  # fmt: skip
    expected = hidden.float() @ ((levels[-1].float() - 128) * scales[-1].float()).T
    torch.testing.assert_close(output.float(), expected, atol=2e-2, rtol=1e-2)
