"""Checks of the native step, run at every start: an instruction set that fails one is not used.

They are short, and no substitute for the tests: they catch a compiler or a processor that computes
something else than here.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from services.engine.core.kernels.attention import AttentionMetadata, paged_attention
from services.engine.core.kernels.cpu.kv_cache import KvLayout, PackedKVCache
from services.engine.core.kernels.cpu.library import Library, check
from services.engine.core.kernels.cpu.packing import (
    GROUP_INPUTS,
    GroupedWeight,
    PackedLinear,
    pack_bf16,
    pack_grouped,
    quantize_4,
    quantize_8,
)
from services.engine.core.kernels.cpu.program import (
    Buffer,
    Program,
    ProgramBuilder,
    StepInput,
)
from services.engine.core.kernels.cpu.team import Team
from services.engine.core.kernels.kv_layer import KVLayer

Rounding: TypeAlias = Callable[[Tensor], GroupedWeight] | None  # None: to bf16

_TOKENS = 7
HEAD_DIM = 32
VOCAB = 48
# Sizes of linear layers for which kernels take different ways: few rows and many, every number of
# rows that a tile has, tiles of rows that do not fill the last one; several groups of inputs; pairs
# of strips of outputs, single ones, and one that is not whole.
_ROWS = (1, 2, 7, *range(9, 17), 19, 41)
_INPUTS, _OUTPUTS = 96, 104


def _quantize_8_with_minima(weight: Tensor) -> GroupedWeight:
    groups = weight.view(len(weight), -1, GROUP_INPUTS)
    minima, peaks = groups.amin(-1).half(), groups.amax(-1)
    scales = ((peaks - minima.float()) / 255).half()
    levels = (groups - minima.float().unsqueeze(-1)) / scales.float().unsqueeze(-1)
    levels = levels.round().clamp(0, 255).to(torch.uint8).view(weight.shape)
    return GroupedWeight(levels, scales, minima, bits=8)


ROUNDINGS: dict[str, Rounding] = {
    "bf16": None,
    "q8": quantize_8,
    "q8 with minima": _quantize_8_with_minima,
    "q4": quantize_4,
}


@check("linear layers")
def multiplies_correctly(library: Library) -> bool:
    """Whether embedding, norm and linear layers of each format give what torch gives, and a row
    the same bits in any company."""
    return all(_linear_is_right(library, rounding) for rounding in ROUNDINGS.values())


@check("attention")
def attends_correctly(library: Library) -> bool:
    """Whether one layer's attention gives what the reference gives."""
    projected = known_values(VOCAB, 3 * HEAD_DIM)
    modules = {"embedding": projected, "head": torch.eye(HEAD_DIM)}
    builder = _builder(modules, None)
    # The embedding is taken for projected queries, keys and values.
    builder.embed("embedding")
    builder.convert(Buffer.RESIDUAL)
    modules["same"] = torch.eye(3 * HEAD_DIM)
    builder.linear("same", Buffer.PROJECTED)
    builder.rotary_kv(0)
    builder.attention(0, HEAD_DIM)
    builder.convert(Buffer.ATTENDED)
    builder.linear("head", Buffer.LOGITS)
    found = run_step(library, builder, HEAD_DIM, _TOKENS)
    queries, keys, values = (
        projected[token_ids(_TOKENS)].bfloat16().float().view(_TOKENS, 3, 1, HEAD_DIM).unbind(1)
    )
    cache = KVLayer(*torch.zeros(2, 1, 16, 1, HEAD_DIM))
    cache.keys[0, :_TOKENS], cache.values[0, :_TOKENS] = keys, values
    tables = torch.zeros(1, 1, dtype=torch.int32)
    metadata = AttentionMetadata((_TOKENS,), (_TOKENS,), tables, 16)
    expected = paged_attention.reference(queries, cache, metadata, 1.0)
    return is_close(found, expected.flatten(1))


def _linear_is_right(library: Library, rounding: Rounding) -> bool:
    modules = {"embedding": known_values(VOCAB, _INPUTS), "head": known_values(_OUTPUTS, _INPUTS)}
    builder = _builder(modules, rounding)
    builder.embed("embedding")
    builder.norm(SimpleNamespace(eps=1e-5))
    builder.linear("head", Buffer.LOGITS)
    rows = rounded(modules["embedding"], rounding)[token_ids(max(_ROWS))]
    normed = rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + 1e-5)
    expected = normed @ rounded(modules["head"], rounding).T
    found = [run_step(library, builder, _OUTPUTS, rows) for rows in _ROWS]
    return is_close(found[-1], expected) and all(
        torch.equal(fewer, found[-1][: len(fewer)]) for fewer in found
    )


def is_close(found: Tensor, expected: Tensor) -> bool:
    """Whether two results differ by no more than rounding."""
    # Activations are rounded to 8 bits at least; a wrong kernel is wrong by whole values.
    return bool(((found - expected).abs() < 0.05 * expected.abs().max()).all())


def known_values(rows: int, columns: int) -> Tensor:
    """Numbers without a pattern between -1 and 1, the same everywhere."""
    index = torch.arange(rows * columns, dtype=torch.float64)
    return index.mul(0.7390851).sin().mul(43.7).frac().float().view(rows, columns)


def token_ids(tokens: int) -> Tensor:
    """The tokens of a step of so many."""
    return torch.arange(tokens) * 5 % VOCAB


def rounded(weight: Tensor, rounding: Rounding) -> Tensor:
    """The values that a matrix has once it is packed."""
    return weight.bfloat16().float() if rounding is None else rounding(weight).dequantize()


def _builder(modules: dict[str, Tensor], rounding: Rounding) -> ProgramBuilder:
    def pack(module: str, gated: bool) -> PackedLinear:
        if rounding is None:
            return pack_bf16(modules[module], gated=gated)
        return pack_grouped(rounding(modules[module]), gated=gated)

    return ProgramBuilder(pack, lambda *_: torch.ones(modules["embedding"].shape[1]))


def run_step(
    library: Library, builder: ProgramBuilder, outputs: int, tokens: int, adapters: Any = None
) -> Tensor:
    """The logits of all tokens of a step with one sequence, [tokens, outputs]; one head."""
    cache = PackedKVCache(1, 1, 64, 1, HEAD_DIM)
    team = Team(library, 1)
    program = Program(
        builder,
        team,
        heads=1,
        kv_heads=1,
        head_dim=HEAD_DIM,
        attention_scale=1.0,
        layers=(KvLayout * 1)(cache.layout(0)),
        num_layers=1,
        max_tokens=tokens,
    )
    positions = torch.arange(tokens, dtype=torch.int32)
    starts = torch.tensor([0, tokens], dtype=torch.int32)
    tables = torch.zeros(1, 1, dtype=torch.int32)
    slots, ids = torch.arange(tokens), token_ids(tokens)
    logits = torch.full((tokens, outputs), float("nan"))
    program.run(
        StepInput(
            num_tokens=tokens,
            num_sequences=1,
            positions=positions.data_ptr(),
            slots=slots.data_ptr(),
            query_starts=starts.data_ptr(),
            context_lengths=starts[1:].data_ptr(),
            block_tables=tables.data_ptr(),
            table_stride=1,
            token_ids=ids.data_ptr(),
            logits_rows=slots.data_ptr(),
            num_rows=tokens,
            logits=logits.data_ptr(),
            adapters=adapters,
        )
    )
    return logits
