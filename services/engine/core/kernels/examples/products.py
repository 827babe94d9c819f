"""Products with matrices of eight and four bits."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from services.engine.core.kernels.examples.base import Example, Maker, examples_of
from services.engine.core.kernels.gated_linear import GATES
from services.engine.core.kernels.matrices import GroupedMatrix, ScaledMatrix
from services.engine.core.kernels.quantized_rows import quantize_rows

_FORMS = ((8, 128, False), (4, 128, False), (4, 32, True), (8, 64, True))


@examples_of("grouped_linear")
def _grouped_linear(make: Maker) -> Iterator[Example]:
    inputs, outputs = make.sizes.hidden, make.sizes.intermediate
    for bits, group, has_minima in _FORMS:
        weight = _grouped(make, (outputs, inputs), bits, group, has_minima)
        for tokens in make.sizes.tokens:
            for bias in (None, make.normal(outputs)):
                what = f"[{tokens}, {inputs}] to {outputs} of {bits} bits by {group}"
                yield Example(what, (make.normal(tokens, inputs), weight, bias))


@examples_of("gated_linear")
def _gated_linear(make: Maker) -> Iterator[Example]:
    inputs, outputs = make.sizes.hidden, 2 * make.sizes.intermediate
    whole = make.normal(outputs, inputs, std=inputs**-0.5)
    for weight in (whole, _grouped(make, (outputs, inputs), 4, 128, False)):
        for tokens in make.sizes.tokens:
            for activation in GATES:
                what = f"[{tokens}, {inputs}] to {outputs}, {activation}"
                yield Example(what, (make.normal(tokens, inputs), weight, None, activation))


@examples_of("gated_scaled_linear")
def _gated_scaled_linear(make: Maker) -> Iterator[Example]:
    for example in _scaled_linear(make):
        for activation in GATES:
            yield Example(f"{example.what}, {activation}", (*example.args, activation))


@examples_of("grouped_embedding")
def _grouped_embedding(make: Maker) -> Iterator[Example]:
    inputs = make.sizes.hidden
    for bits, group, has_minima in _FORMS:
        weight = _grouped(make, (make.sizes.vocab, inputs), bits, group, has_minima)
        for tokens in make.sizes.tokens:
            args = make.integers(tokens, below=make.sizes.vocab), weight, torch.bfloat16
            yield Example(f"{tokens} tokens of {bits} bits by {group}", args)


@examples_of("scaled_linear")
def _scaled_linear(make: Maker) -> Iterator[Example]:
    inputs, outputs = make.sizes.hidden, make.sizes.intermediate
    for dtype in (torch.int8, torch.float8_e4m3fn):
        elements, scales = quantize_rows.reference(make.normal(outputs, inputs), dtype)
        weight = ScaledMatrix(elements, scales)
        for tokens in make.sizes.tokens:
            rows, row_scales = quantize_rows.reference(make.normal(tokens, inputs), dtype)
            for bias in (None, make.normal(outputs)):
                args = rows, row_scales, weight, bias, torch.bfloat16
                yield Example(f"[{tokens}, {inputs}] to {outputs} of {dtype}", args)


@examples_of("grouped_mixture_of_experts")
def _grouped_mixture_of_experts(make: Maker) -> Iterator[Example]:
    size, inner, experts = make.sizes.hidden, make.sizes.intermediate // 3, 8
    for bits, group, has_minima in _FORMS:
        if inner % group:
            continue
        gate_up = _grouped(make, (experts, 2 * inner, size), bits, group, has_minima)
        down = _grouped(make, (experts, size, inner), bits, group, has_minima)
        for tokens in make.sizes.tokens:
            chosen = make.normal(tokens, experts, dtype=torch.float32).softmax(-1).topk(2)
            weights = chosen.values.bfloat16()
            args = make.normal(tokens, size), gate_up, down, chosen.indices, weights
            yield Example(f"{tokens} tokens, 2 of {experts} experts of {bits} bits", args)


def _grouped(
    make: Maker, shape: tuple[int, ...], bits: int, group: int, has_minima: bool
) -> GroupedMatrix:
    *outer, inputs = shape
    levels = make.integers(*outer, inputs * bits // 8, below=256).to(torch.uint8)
    scales = make.normal(*outer, inputs // group, dtype=torch.float16).abs() / 2**bits
    minima = None
    if has_minima:
        minima = make.normal(*outer, inputs // group, dtype=torch.float16) - 0.5
    return GroupedMatrix(levels, scales, minima, bits)
