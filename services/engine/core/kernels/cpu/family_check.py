"""Checks of what some families of decoders have beside a plain layer, run at every start: as those
of self_check.py, short."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from services.engine.core.kernels.attention import AttentionMetadata, paged_attention
from services.engine.core.kernels.cpu.library import Library, check
from services.engine.core.kernels.cpu.packing import PackedLinear, pack_bf16, pack_grouped
from services.engine.core.kernels.cpu.program import Buffer, Epilogue, Packed, ProgramBuilder
from services.engine.core.kernels.cpu.self_check import (
    HEAD_DIM,
    ROUNDINGS,
    VOCAB,
    Rounding,
    is_close,
    known_values,
    rounded,
    run_step,
    token_ids,
)
from services.engine.core.kernels.experts import mixture_of_experts
from services.engine.core.kernels.kv_layer import KVLayer
from services.engine.core.kernels.rotary import rotary_embedding

_SIZE = 96
_EPS = 1e-5
# Rows that kernels take together, and one that is left; tokens further back than a window.
_ROWS = 11
_WINDOW = 3
_CAP = 1.5


@check("epilogues")
def finishes_correctly(library: Library) -> bool:
    """Whether what becomes of a matrix's sums is what torch makes of them."""
    return all(
        _epilogue_is_right(library, epilogue, ROUNDINGS[name])
        for epilogue in _EPILOGUES
        for name in ("bf16", "q8")
    )


def _gated(activate: Callable[[Tensor], Tensor], sums: Tensor) -> Tensor:
    gates, values = sums.chunk(2, dim=-1)
    return activate(gates) * values


def _gelu(values: Tensor) -> Tensor:
    return functional.gelu(values, approximate="tanh")


_EPILOGUES: dict[Epilogue, Callable[[Tensor], Tensor]] = {
    Epilogue.GATED_SILU: lambda sums: _gated(functional.silu, sums),
    Epilogue.GATED_GELU: lambda sums: _gated(_gelu, sums),
    Epilogue.GELU: _gelu,
    Epilogue.CAPPED: lambda sums: torch.tanh(sums / _CAP) * _CAP,
}


def _epilogue_is_right(library: Library, epilogue: Epilogue, rounding: Rounding) -> bool:
    embedding = known_values(VOCAB, _SIZE)
    # So small that functions bend and do not merely cut off.
    matrix = known_values(2 * _SIZE, _SIZE) / 4
    builder = _builder({"embedding": embedding, "matrix": matrix}, rounding)
    builder.embed("embedding")
    builder.convert(Buffer.RESIDUAL)
    builder.linear("matrix", Buffer.LOGITS, epilogue=epilogue, cap=_CAP)
    rows = rounded(embedding, rounding)[token_ids(_ROWS)]
    expected = _EPILOGUES[epilogue](rows @ rounded(matrix, rounding).T)
    return is_close(run_step(library, builder, expected.shape[1], _ROWS), expected)


@check("norms")
def norms_correctly(library: Library) -> bool:
    """Whether LayerNorm, positions that were learned, the scale of embeddings, and additions to the
    residual stream, normed and not, are what torch has."""
    modules = {
        "embedding": known_values(VOCAB, _SIZE),
        "matrix": known_values(_SIZE, _SIZE + 1)[:, 1:],
        "same": torch.eye(_SIZE),
    }
    scale, shift = known_values(2, _SIZE) + 1
    norm = SimpleNamespace(weight=scale, bias=shift, eps=_EPS)
    post_norm = SimpleNamespace(weight=scale, bias=None, eps=_EPS)
    # Rows with a mean that is not 0.
    positions = SimpleNamespace(weight=known_values(_ROWS, _SIZE) + 1)
    builder = _builder(modules)
    builder.embed("embedding", scale=3.0, positions=positions)
    builder.norm(norm)
    builder.linear("matrix", Buffer.PROJECTED)
    builder.add_norm(post_norm, Buffer.PROJECTED)
    builder.convert(Buffer.RESIDUAL)
    builder.linear("matrix", Buffer.RESIDUAL, epilogue=Epilogue.ADD)
    builder.convert(Buffer.RESIDUAL)
    builder.linear("same", Buffer.LOGITS)
    hidden = rounded(modules["embedding"], None)[token_ids(_ROWS)] * 3.0 + positions.weight
    matrix = rounded(modules["matrix"], None)
    normed = functional.layer_norm(hidden, (_SIZE,), scale, shift, _EPS)
    hidden = hidden + functional.rms_norm(normed @ matrix.T, (_SIZE,), scale, _EPS)
    expected = hidden + hidden @ matrix.T
    return is_close(run_step(library, builder, _SIZE, _ROWS), expected)


@dataclass(frozen=True, slots=True)
class _Attention:
    """What a family's attention has beside that of others."""

    normed: bool = False
    rotated: bool = False
    window: int | None = None
    softcap: float | None = None


_ATTENTIONS = (
    _Attention(rotated=True),
    _Attention(normed=True),
    _Attention(window=_WINDOW),
    _Attention(softcap=_CAP),
)


@check("attention of families")
def attends_correctly(library: Library) -> bool:
    """Whether rotated and normed queries and keys, a window and a soft cap give what the reference
    gives."""
    return all(_attention_is_right(library, kind) for kind in _ATTENTIONS)


def _attention_is_right(library: Library, kind: _Attention) -> bool:
    projected = known_values(VOCAB, 3 * HEAD_DIM)
    builder = _builder(
        {"embedding": projected, "same": torch.eye(3 * HEAD_DIM), "head": torch.eye(HEAD_DIM)}
    )
    frequencies = 0.5 ** torch.arange(HEAD_DIM // 2)
    scales = known_values(2, HEAD_DIM) + 1
    norms = [SimpleNamespace(weight=scale, eps=_EPS) for scale in scales]
    # The embedding is taken for projected queries, keys and values.
    builder.embed("embedding")
    builder.convert(Buffer.RESIDUAL)
    builder.linear("same", Buffer.PROJECTED)
    builder.rotary_kv(
        0,
        SimpleNamespace(frequencies=frequencies, amplitude=1.0) if kind.rotated else None,
        q_norm=norms[0] if kind.normed else None,
        k_norm=norms[1] if kind.normed else None,
    )
    builder.attention(0, HEAD_DIM, window=kind.window, softcap=kind.softcap)
    builder.convert(Buffer.ATTENDED)
    builder.linear("head", Buffer.LOGITS)
    found = run_step(library, builder, HEAD_DIM, _ROWS)
    heads = rounded(projected, None)[token_ids(_ROWS)].view(_ROWS, 3, HEAD_DIM)
    rotated, values = heads[:, :2], heads[:, 2:]
    if kind.normed:
        rotated = functional.rms_norm(rotated, (HEAD_DIM,), eps=_EPS) * scales
    if kind.rotated:
        angles = torch.arange(_ROWS).view(-1, 1, 1) * frequencies
        cos, sin = angles.cos(), angles.sin()
        rotated = rotary_embedding.reference(
            rotated, torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
        )
    cache = KVLayer(*torch.zeros(2, 1, 16, 1, HEAD_DIM))
    cache.keys[0, :_ROWS], cache.values[0, :_ROWS] = rotated[:, 1:], values
    tables = torch.zeros(1, 1, dtype=torch.int32)
    expected = paged_attention.reference(
        rotated[:, :1],
        cache,
        AttentionMetadata((_ROWS,), (_ROWS,), tables, 16),
        1.0,
        kind.window,
        kind.softcap,
    )
    return is_close(found, expected.flatten(1))


_EXPERTS, _OF_A_TOKEN, _INNER = 5, 2, 64


@check("experts")
def mixes_correctly(library: Library) -> bool:
    """Whether rows go to the experts that they are sent to, and come back by their shares."""
    return all(_mixture_is_right(library, normalize) for normalize in (False, True))


def _mixture_is_right(library: Library, normalize: bool) -> bool:
    # A row's first numbers say which experts it is sent to, so clearly that rounding sends no row
    # elsewhere: to one, and less so to the one after the next.
    embedding = known_values(VOCAB, _SIZE) / 2
    tokens = torch.arange(VOCAB)
    embedding[:, :_EXPERTS] = 0.0
    embedding[tokens, tokens % _EXPERTS] = 4.0
    embedding[tokens, (tokens + 2) % _EXPERTS] = 3.0
    gate_up = known_values(_EXPERTS * 2 * _INNER, _SIZE).view(_EXPERTS, 2 * _INNER, _SIZE) / 4
    down = known_values(_EXPERTS * _SIZE, _INNER).view(_EXPERTS, _SIZE, _INNER)
    router = torch.eye(_EXPERTS, _SIZE)
    norm = SimpleNamespace(weight=torch.ones(_SIZE), bias=None, eps=_EPS)
    layer = SimpleNamespace(
        router="router",
        per_token=_OF_A_TOKEN,
        normalize=normalize,
        experts=SimpleNamespace(count=_EXPERTS, matrices=lambda: ("gate_up", "down")),
    )
    modules = {"embedding": embedding, "router": router, "gate_up": gate_up, "down": down}
    builder = _builder(modules | {"same": torch.eye(_SIZE)})
    builder.embed("embedding")
    builder.mixture_of_experts(norm, layer, Epilogue.GATED_SILU)
    builder.convert(Buffer.RESIDUAL)
    builder.linear("same", Buffer.LOGITS)
    found = run_step(library, builder, _SIZE, _ROWS)
    hidden = rounded(embedding, None)[token_ids(_ROWS)]
    normed = functional.rms_norm(hidden, (_SIZE,), eps=_EPS)
    shares, ids = (normed @ router.T).softmax(-1).topk(_OF_A_TOKEN, dim=-1)
    if normalize:
        shares = shares / shares.sum(-1, keepdim=True)
    mixed = mixture_of_experts.reference(
        normed, rounded(gate_up, None), rounded(down, None), ids, shares
    )
    # What was there before is not what is looked for.
    return is_close(found - hidden, mixed)


def _builder(modules: dict[str, Tensor], rounding: Rounding = None) -> ProgramBuilder:
    def pack(module: str, gated: bool) -> Packed:
        weight = modules[module]
        return [one(each, gated) for each in weight] if weight.dim() == 3 else one(weight, gated)

    def one(weight: Tensor, gated: bool) -> PackedLinear:
        if rounding is None:
            return pack_bf16(weight, gated=gated)
        return pack_grouped(rounding(weight), gated=gated)

    def read(module: Any, kind: str) -> Tensor:
        values: Tensor = getattr(module, kind)
        return values

    return ProgramBuilder(pack, read, max_positions=_ROWS)
