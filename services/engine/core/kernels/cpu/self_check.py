"""Checks of the native step, run at every start: an instruction set that fails one is not used.

They are short, and no substitute for the tests: they catch a compiler or a processor that computes
something else than here.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

from services.engine.core.kernels.attention import AttentionMetadata, paged_attention
from services.engine.core.kernels.cpu.kv_cache import KvLayout, PackedKVCache
from services.engine.core.kernels.cpu.library import Library, check
from services.engine.core.kernels.cpu.packing import (
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

_TOKENS = 7
_HEAD_DIM = 32
_VOCAB = 48


@check("linear layers")
def multiplies_correctly(library: Library) -> bool:
    """Whether embedding, norm and linear layers of each format give what torch gives."""
    return all(_linear_is_right(library, bits) for bits in (4, 8, 16))


@check("attention")
def attends_correctly(library: Library) -> bool:
    """Whether one layer's attention gives what the reference gives."""
    projected = _values(_VOCAB, 3 * _HEAD_DIM)
    modules = {"embedding": projected, "head": torch.eye(_HEAD_DIM)}
    builder = _builder(modules, bits=16)
    # The embedding is taken for projected queries, keys and values.
    builder.embed("embedding")
    builder.convert(Buffer.RESIDUAL)
    modules["same"] = torch.eye(3 * _HEAD_DIM)
    builder.linear("same", Buffer.PROJECTED)
    builder.rotary_kv(0)
    builder.attention(0, _HEAD_DIM)
    builder.convert(Buffer.ATTENDED)
    builder.linear("head", Buffer.LOGITS)
    found = _run(library, builder, _HEAD_DIM)
    # At angle 0 nothing is rotated.
    queries, keys, values = (
        projected[_ids()].bfloat16().float().view(_TOKENS, 3, 1, _HEAD_DIM).unbind(1)
    )
    blocks = torch.zeros(1, 16, 1, _HEAD_DIM)
    key_cache, value_cache = blocks.clone(), blocks.clone()
    key_cache[0, :_TOKENS], value_cache[0, :_TOKENS] = keys, values
    tables = torch.zeros(1, 1, dtype=torch.int32)
    metadata = AttentionMetadata((_TOKENS,), (_TOKENS,), tables, 16)
    expected = paged_attention.reference(queries, key_cache, value_cache, metadata, 1.0)
    return _is_close(found, expected.flatten(1))


def _linear_is_right(library: Library, bits: int) -> bool:
    modules = {"embedding": _values(_VOCAB, _HEAD_DIM), "head": _values(40, _HEAD_DIM)}
    builder = _builder(modules, bits)
    builder.embed("embedding")
    builder.norm(SimpleNamespace(eps=1e-5))
    builder.linear("head", Buffer.LOGITS)
    found = _run(library, builder, 40)
    rows = _rounded(modules["embedding"], bits)[_ids()]
    normed = rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + 1e-5)
    return _is_close(found, normed @ _rounded(modules["head"], bits).T)


def _is_close(found: Tensor, expected: Tensor) -> bool:
    # Activations are rounded to 8 bits at least; a wrong kernel is wrong by whole values.
    return bool(((found - expected).abs() < 0.05 * expected.abs().max()).all())


def _values(rows: int, columns: int) -> Tensor:
    """Numbers without a pattern between -1 and 1, the same everywhere."""
    index = torch.arange(rows * columns, dtype=torch.float64)
    return index.mul(0.7390851).sin().mul(43.7).frac().float().view(rows, columns)


def _ids() -> Tensor:
    return torch.arange(_TOKENS) * 5 % _VOCAB


def _rounded(weight: Tensor, bits: int) -> Tensor:
    if bits == 16:
        return weight.bfloat16().float()
    return (quantize_8 if bits == 8 else quantize_4)(weight).dequantize()


def _builder(modules: dict[str, Tensor], bits: int) -> ProgramBuilder:
    def pack(module: str, gated: bool) -> PackedLinear:
        if bits == 16:
            return pack_bf16(modules[module], gated=gated)
        return pack_grouped((quantize_8 if bits == 8 else quantize_4)(modules[module]), gated=gated)

    return ProgramBuilder(pack, lambda _: torch.ones(_HEAD_DIM))


def _run(library: Library, builder: ProgramBuilder, outputs: int) -> Tensor:
    """The logits of all tokens, [_TOKENS, outputs]."""
    cache = PackedKVCache(1, 1, 16, 1, _HEAD_DIM)
    team = Team(library, 1)
    angles = torch.zeros(_TOKENS, _HEAD_DIM // 2)
    program = Program(
        builder,
        team,
        heads=1,
        kv_heads=1,
        head_dim=_HEAD_DIM,
        rotary_dim=_HEAD_DIM,
        attention_scale=1.0,
        cos=torch.ones_like(angles),
        sin=angles,
        layers=(KvLayout * 1)(cache.layout(0)),
        num_layers=1,
        max_tokens=_TOKENS,
    )
    positions = torch.arange(_TOKENS, dtype=torch.int32)
    starts = torch.tensor([0, _TOKENS], dtype=torch.int32)
    tables = torch.zeros(1, 1, dtype=torch.int32)
    slots, ids = torch.arange(_TOKENS), _ids()
    logits = torch.empty(_TOKENS, outputs)
    program.run(
        StepInput(
            num_tokens=_TOKENS,
            num_sequences=1,
            positions=positions.data_ptr(),
            slots=slots.data_ptr(),
            query_starts=starts.data_ptr(),
            context_lengths=starts[1:].data_ptr(),
            block_tables=tables.data_ptr(),
            table_stride=1,
            token_ids=ids.data_ptr(),
            logits_rows=slots.data_ptr(),
            num_rows=_TOKENS,
            logits=logits.data_ptr(),
        )
    )
    return logits
