"""Mixtures of experts whose matrices have eight or four bits in groups.

As experts.py has it: rows in the order of experts, and programs that look up whose rows theirs
are; the products themselves are those of linear_grouped.py. Of an expert that no token chose,
nothing is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from triton import cdiv, jit
from triton import language as tl

from services.engine.core.kernels.activation import silu_and_mul
from services.engine.core.kernels.experts import grouped_mixture_of_experts, mixture_of_experts
from services.engine.core.kernels.matrices import GroupedMatrix
from services.engine.core.kernels.triton import why_not
from services.engine.core.kernels.triton.experts_combine import combine
from services.engine.core.kernels.triton.experts_routing import plan, rows_of_block
from services.engine.core.kernels.triton.language import rounded, wait_for_earlier
from services.engine.core.kernels.triton.linear_grouped import float_rows, grouped_product
from services.engine.core.kernels.triton.linear_splits import Tile
from services.engine.core.kernels.triton.serving import begins_early, early_forms
from services.engine.core.kernels.triton.specialisation import Specialisation

# By the rows that an expert has on average. Narrow, for few rows: experts share out the programs.
_TILES = (
    (16, Tile(rows=16, outputs=32, inputs=128, num_warps=4, num_stages=4)),
    (32, Tile(rows=32, outputs=64, inputs=128, num_warps=4, num_stages=4)),
    (1 << 31, Tile(rows=64, outputs=64, inputs=128, num_warps=4, num_stages=3)),
)


@jit(do_not_specialize=["blocks"])
def grouped_experts_kernel(  # type: ignore[no-untyped-def]
    hidden,
    levels,
    scales,
    minima,
    shares,
    output,
    order,
    table,
    blocks,
    outputs,
    inputs,
    row_bytes,
    row_groups,
    hidden_stride,
    experts: tl.constexpr,
    per_token: tl.constexpr,
    bits: tl.constexpr,
    group_size: tl.constexpr,
    is_whole: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_outputs: tl.constexpr,
    tile_inputs: tl.constexpr,
    is_early: tl.constexpr,
):
    """Rows times the matrix of their expert. Without `shares`, rows of tokens become rows in the
    order of experts; with them, rows in this order become those of choices, times their share."""
    wait_for_earlier(is_early)
    block = tl.program_id(0)
    expert = tl.load(table + block * 3)
    if expert < experts:
        place, inside, choice = rows_of_block(order, table, block, tile_rows)
        column = tl.program_id(1) * tile_outputs + tl.arange(0, tile_outputs)
        source, target = choice // per_token, place
        if shares is not None:
            source, target = place, choice
        total = grouped_product(
            hidden + source.to(tl.int64)[:, None] * hidden_stride,
            inside[:, None],
            levels,
            scales,
            minima,
            expert.to(tl.int64) * outputs + column,
            column < outputs,
            inputs,
            row_bytes,
            row_groups,
            0,
            tl.cdiv(inputs, tile_inputs),
            bits,
            group_size,
            is_whole,
            tile_rows,
            tile_outputs,
            tile_inputs,
        )
        if shares is not None:
            share = tl.load(shares + choice, mask=inside, other=0.0).to(tl.float32)
            total *= share[:, None]
        there = output + target.to(tl.int64)[:, None] * outputs + column[None, :]
        written = inside[:, None] & (column < outputs)[None, :]
        tl.store(there, rounded(total, output.dtype.element_ty), mask=written)


@grouped_mixture_of_experts.implementation("cuda", name="triton", unavailable=why_not)
def grouped_mixture_of_experts_triton(
    hidden: Tensor,
    gate_up: Tensor | GroupedMatrix,
    down: Tensor | GroupedMatrix,
    expert_ids: Tensor,
    expert_weights: Tensor,
) -> Tensor:
    """hidden may have any stride between rows. One stack of few bits beside one of floats is turned
    into floats first: so a file has to be made on purpose."""
    if hidden.dtype not in (torch.bfloat16, torch.float16) or hidden.stride(1) != 1:
        return grouped_mixture_of_experts.reference(
            hidden, gate_up, down, expert_ids, expert_weights
        )
    if isinstance(gate_up, Tensor) or isinstance(down, Tensor):
        floats = _floats(gate_up, hidden.dtype), _floats(down, hidden.dtype)
        return mixture_of_experts(hidden, floats[0], floats[1], expert_ids, expert_weights)
    (num_tokens, size), per_token = hidden.shape, expert_ids.shape[1]
    choices = num_tokens * per_token
    if not choices:
        return torch.zeros_like(hidden)
    count, doubled, _ = gate_up.shape
    tile = next(tile for most, tile in _TILES if choices <= most * count)
    order, table = plan(expert_ids.contiguous().view(-1), count, tile.rows)
    raised = hidden.new_empty(choices, doubled)
    _launch(hidden, gate_up, None, raised, order, table, per_token, tile)
    outer = hidden.new_empty(choices, size)
    shares = expert_weights.contiguous()
    _launch(silu_and_mul(raised), down, shares, outer, order, table, per_token, tile)
    return outer if per_token == 1 else combine(outer, per_token)


def _floats(stack: Tensor | GroupedMatrix, dtype: torch.dtype) -> Tensor:
    if isinstance(stack, Tensor):
        return stack
    flat = GroupedMatrix(
        stack.levels.flatten(0, 1),
        stack.scales.flatten(0, 1),
        None if stack.minima is None else stack.minima.flatten(0, 1),
        stack.bits,
    )
    return float_rows(flat, dtype).view(stack.shape)


def _launch(
    hidden: Tensor,
    stack: GroupedMatrix,
    shares: Tensor | None,
    output: Tensor,
    order: Tensor,
    table: Tensor,
    per_token: int,
    tile: Tile,
) -> None:
    count, outputs, inputs = stack.shape
    grouped_experts_kernel[(len(table), cdiv(outputs, tile.outputs))](
        hidden,
        stack.levels,
        stack.scales,
        stack.minima,
        shares,
        output,
        order,
        table,
        len(table),
        outputs,
        inputs,
        stack.levels.shape[-1],
        stack.scales.shape[-1],
        hidden.stride(0),
        experts=count,
        per_token=per_token,
        bits=stack.bits,
        group_size=stack.group_size,
        is_whole=inputs % tile.inputs == 0,
        tile_rows=tile.rows,
        tile_outputs=tile.outputs,
        tile_inputs=tile.inputs,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **begins_early(hidden.device),
    )


def _forms() -> Iterator[Specialisation]:
    numbers = dict.fromkeys(
        ("outputs", "inputs", "row_bytes", "row_groups", "hidden_stride"), "i32:16"
    )
    signature = {"hidden": "*bf16", "output": "*bf16", "levels": "*u8", "scales": "*fp16"}
    signature |= numbers | {"order": "*i32", "table": "*i32", "blocks": "i32"}
    for bits, group_size in ((4, 32), (4, 128), (8, 32)):
        minima = {"minima": "*fp16"} if bits == 4 else {}
        own: dict[str, Any] = {"experts": 8, "per_token": 2, "bits": bits}
        own |= {"group_size": group_size, "is_whole": True}
        own |= {} if minima else {"minima": None}
        for _, tile in _TILES:
            shape = {
                "tile_rows": tile.rows,
                "tile_outputs": tile.outputs,
                "tile_inputs": tile.inputs,
            }
            for shares in ({}, {"shares": "*bf16"}):
                constants = own | shape | ({} if shares else {"shares": None})
                yield Specialisation(
                    grouped_experts_kernel,
                    signature | minima | shares,
                    constants,
                    tile.num_warps,
                    tile.num_stages,
                    spills="two words, on Ampere by Triton 3.6" if group_size == 32 else "",
                )


COMPILED = early_forms(_forms())
