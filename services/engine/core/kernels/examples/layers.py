"""Norms, activations, projections of floats, rope, adapters and experts."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from services.engine.core.kernels.examples.base import EPS, Example, Maker, examples_of
from services.engine.core.kernels.low_rank import AdapterTable, LowRankPart, group_by_adapter


@examples_of("rms_norm")
def _rms_norm(make: Maker) -> Iterator[Example]:
    size = make.sizes.hidden
    for tokens in make.sizes.tokens:
        for dtype in (torch.bfloat16, torch.float16):
            args = make.normal(tokens, size, dtype=dtype), make.normal(size, dtype=dtype), EPS
            yield Example(f"[{tokens}, {size}] {dtype}", args)


@examples_of("layer_norm")
def _layer_norm(make: Maker) -> Iterator[Example]:
    size = make.sizes.hidden
    for tokens in make.sizes.tokens:
        args = make.normal(tokens, size), make.normal(size), make.normal(size), EPS
        yield Example(f"[{tokens}, {size}]", args)


@examples_of("add_rms_norm")
def _add_rms_norm(make: Maker) -> Iterator[Example]:
    size = make.sizes.hidden
    for tokens in make.sizes.tokens:
        for before, what in ((None, ""), (make.normal(size), ", normed before")):
            args = make.normal(tokens, size), make.normal(tokens, size), make.normal(size), EPS
            yield Example(f"[{tokens}, {size}]{what}", (*args, before))


@examples_of("rms_norm_of_rows")
def _rms_norm_of_rows(make: Maker) -> Iterator[Example]:
    for example in _add_rms_norm(make):
        added, hidden, weight, eps, before = example.args
        rows = make.order(len(hidden))[: -(-len(hidden) // 2)]
        yield Example(example.what, (hidden, rows, weight, eps, added, before))


@examples_of("add_rms_norm_quantized")
def _add_rms_norm_quantized(make: Maker) -> Iterator[Example]:
    for example in _add_rms_norm(make):
        for dtype in (torch.int8, torch.float8_e4m3fn):
            hidden, residual, weight, eps, before = example.args
            # An implementation may write into the residual.
            args = hidden, residual.clone(), weight, eps, dtype, before
            yield Example(f"{example.what} {dtype}", args)


@examples_of("quantize_rows")
def _quantize_rows(make: Maker) -> Iterator[Example]:
    size = make.sizes.hidden
    for tokens in make.sizes.tokens:
        for dtype in (torch.int8, torch.float8_e4m3fn):
            yield Example(f"[{tokens}, {size}] {dtype}", (make.normal(tokens, size), dtype))


@examples_of("silu_and_mul", "gelu_tanh_and_mul", "gelu_tanh")
def _activation(make: Maker) -> Iterator[Example]:
    size = 2 * make.sizes.intermediate
    for tokens in make.sizes.tokens:
        yield Example(f"[{tokens}, {size}]", (make.normal(tokens, size),))


@examples_of("linear")
def _linear(make: Maker) -> Iterator[Example]:
    inputs, outputs = make.sizes.hidden, make.sizes.intermediate
    weight = make.normal(outputs, inputs, std=0.02)
    for tokens in make.sizes.tokens:
        for bias in (None, make.normal(outputs)):
            args = make.normal(tokens, inputs), weight, bias
            yield Example(f"[{tokens}, {inputs}] to {outputs}", args)


@examples_of("rotary_angles")
def _rotary_angles(make: Maker) -> Iterator[Example]:
    for head_dim in make.sizes.head_dims:
        exponents = torch.arange(0, head_dim, 2, device=make.device) / head_dim
        frequencies = 500_000.0**-exponents
        for tokens in make.sizes.tokens:
            # Also where angles are thousands of turns.
            positions = make.integers(tokens, below=131072)
            args = positions, frequencies, 1.2, torch.bfloat16
            yield Example(f"{tokens} tokens of {head_dim}", args)


@examples_of("rotary_embedding")
def _rotary_embedding(make: Maker) -> Iterator[Example]:
    for head_dim in make.sizes.head_dims:
        for rotary_dim in (head_dim, head_dim // 2):
            for tokens in make.sizes.tokens:
                heads = make.normal(tokens, make.sizes.heads, head_dim)
                angles = make.normal(tokens, 1, rotary_dim // 2, dtype=torch.float32)
                cos = torch.cat((angles.cos(), angles.cos()), -1).to(heads.dtype)
                sin = torch.cat((-angles.sin(), angles.sin()), -1).to(heads.dtype)
                yield Example(f"{list(heads.shape)}, {rotary_dim} of it", (heads, cos, sin))


@examples_of("add_low_rank")
def _add_low_rank(make: Maker) -> Iterator[Example]:
    inputs, outputs, rank = make.sizes.hidden, make.sizes.intermediate, 16
    part = LowRankPart(make.normal(rank, inputs), make.normal(outputs // 2, rank, std=0.1), 8)
    for tokens in make.sizes.tokens:
        projected, hidden = make.normal(tokens, outputs), make.normal(tokens, inputs)
        rows = make.order(tokens)[: -(-tokens // 2)].sort().values
        yield Example(f"{len(rows)} rows", (projected, hidden, rows, part), written=(projected,))


@examples_of("group_by_adapter")
def _group_by_adapter(make: Maker) -> Iterator[Example]:
    for tokens in make.sizes.tokens:
        slots = make.order(tokens).to(torch.int32) % 5 - 1
        yield Example(f"{tokens} tokens", (slots,))


@examples_of("add_low_ranks")
def _add_low_ranks(make: Maker) -> Iterator[Example]:
    inputs, outputs = make.sizes.hidden, make.sizes.intermediate
    table = AdapterTable(3, 64, [2], make.device)
    half = outputs // 2
    for slot, rank in ((0, 16), (2, 8)):
        parts = tuple(
            LowRankPart(make.normal(rank, inputs), make.normal(half, rank, std=0.1), first)
            for first in (0, half)
        )
        table.set(slot, [parts])
    for tokens in make.sizes.tokens:
        projected, hidden = make.normal(tokens, outputs), make.normal(tokens, inputs)
        slots = torch.arange(tokens, dtype=torch.int32, device=make.device) % 4 - 1
        args = projected, hidden, group_by_adapter.reference(slots), table.at[0]
        yield Example(f"{tokens} tokens of 2 adapters", args, written=(projected,))


@examples_of("choose_experts")
def _choose_experts(make: Maker) -> Iterator[Example]:
    for tokens in make.sizes.tokens:
        for experts, per_token, normalize in ((8, 2, True), (128, 8, True), (60, 4, False)):
            # No two are alike: of those, anyone may come first.
            logits = torch.stack([make.order(experts) for _ in range(tokens)]) * (8 / experts)
            args = logits.float(), per_token, normalize
            yield Example(f"{tokens} tokens, {per_token} of {experts} experts", args)


@examples_of("mixture_of_experts")
def _mixture_of_experts(make: Maker) -> Iterator[Example]:
    size, inner, experts = make.sizes.hidden, make.sizes.intermediate // 2, 8
    gate_up = make.normal(experts, 2 * inner, size, std=0.05)
    down = make.normal(experts, size, inner, std=0.05)
    for tokens in make.sizes.tokens:
        chosen = make.normal(tokens, experts, dtype=torch.float32).softmax(-1).topk(2)
        args = make.normal(tokens, size), gate_up, down, chosen.indices, chosen.values.bfloat16()
        yield Example(f"{tokens} tokens, 2 of {experts} experts", args)
