"""A check of the native encoder, run at every start: as those of self_check.py, short."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from services.engine.core.kernels.cpu.encoder_program import (
    EncoderBuffer,
    EncoderInput,
    EncoderProgram,
    EncoderProgramBuilder,
)
from services.engine.core.kernels.cpu.library import Library, check
from services.engine.core.kernels.cpu.packing import pack_bf16
from services.engine.core.kernels.cpu.program import Epilogue
from services.engine.core.kernels.cpu.self_check import is_close, known_values
from services.engine.core.kernels.cpu.team import Team
from services.engine.core.kernels.rotary import rotary_embedding

_SIZE, _HEADS, _INNER, _VOCAB = 32, 2, 64, 48
_HEAD_DIM = _SIZE // _HEADS
# One that fills no tile, one that fills more than a chunk of keys.
_LENGTHS = (5, 140)
_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "gelu_new": lambda values: functional.gelu(values, approximate="tanh"),
    "relu": functional.relu,
    "silu": functional.silu,
    "tanh": torch.tanh,
}


@dataclass(frozen=True, slots=True)
class _Kind:
    """What a family's layer has: positions that are learned or rotated, a window, a gate."""

    function: str = "gelu"
    modern: bool = False  # with rotation, gates, norms beside the residual stream
    window: int | None = None


_KINDS = (*map(_Kind, _FUNCTIONS), _Kind(modern=True), _Kind(modern=True, window=8))


@check("encoders")
def encodes_correctly(library: Library) -> bool:
    """Whether a layer of each kind gives what torch gives, for a short sequence and a long one."""
    return all(_is_right(library, kind) for kind in _KINDS)


def _is_right(library: Library, kind: _Kind) -> bool:
    modules = {
        name: SimpleNamespace(
            weight=known_values(*shape).bfloat16().float() / 4, bias=None, eps=1e-5
        )
        for name, shape in {
            "words": (_VOCAB, _SIZE),
            "positions": (sum(_LENGTHS) + 1, _SIZE),
            "qkv": (3 * _SIZE, _SIZE),
            "output": (_SIZE, _SIZE),
            "up": (2 * _INNER if kind.modern else _INNER, _SIZE),
            "down": (_SIZE, _INNER),
        }.items()
    }
    # Attention that cares for what it sees.
    modules["qkv"].weight[: 2 * _SIZE] *= 4
    norm = SimpleNamespace(
        weight=torch.ones(_SIZE),
        bias=None if kind.modern else torch.full((_SIZE,), 0.5),
        eps=1e-5,
    )
    token_ids = torch.arange(sum(_LENGTHS), dtype=torch.int32) * 5 % _VOCAB
    found = _run(library, modules, norm, token_ids, kind)
    return is_close(found, _reference(modules, norm, token_ids, kind))


def _angles() -> Tensor:
    """Of each position in a sequence, [longest, head_dim / 2]."""
    return torch.arange(max(_LENGTHS)).unsqueeze(1) * 0.5 ** torch.arange(_HEAD_DIM // 2)


def _run(
    library: Library, modules: dict[str, Any], norm: Any, token_ids: Tensor, kind: _Kind
) -> Tensor:
    builder = EncoderProgramBuilder(
        lambda module: pack_bf16(module.weight),
        lambda module, name: getattr(module, name),
        hidden_size=_SIZE,
        heads=_HEADS,
    )
    positions = None if kind.modern else modules["positions"]
    builder.embed(modules["words"], positions, first_position=1)
    builder.norm(norm, replaces=not kind.modern)
    builder.linear(modules["qkv"], EncoderBuffer.PROJECTED)
    if kind.modern:
        builder.rotary(_angles().cos(), _angles().sin())
    builder.attention(kind.window)
    builder.activate(EncoderBuffer.ATTENDED)
    builder.linear(modules["output"], EncoderBuffer.HIDDEN, epilogue=Epilogue.ADD)
    builder.norm(norm, replaces=not kind.modern)
    builder.linear(modules["up"], EncoderBuffer.INNER)
    builder.activate(EncoderBuffer.INNER, kind.function, gated=kind.modern)
    builder.linear(modules["down"], EncoderBuffer.HIDDEN, epilogue=Epilogue.ADD)
    program = EncoderProgram(builder, Team(library, 1))
    num_tokens = len(token_ids)
    starts = torch.tensor([0, _LENGTHS[0], num_tokens], dtype=torch.int32)
    zeros = torch.zeros(num_tokens, dtype=torch.int32)
    places = torch.cat([torch.arange(length, dtype=torch.int32) for length in _LENGTHS])
    hidden = torch.full((num_tokens, _SIZE), float("nan"))
    program.run(
        EncoderInput(
            num_tokens=num_tokens,
            num_sequences=len(_LENGTHS),
            starts=starts.data_ptr(),
            token_ids=token_ids.data_ptr(),
            positions=places.data_ptr(),
            types=zeros.data_ptr(),
            hidden=hidden.data_ptr(),
        )
    )
    return hidden


def _reference(modules: dict[str, Any], norm: Any, token_ids: Tensor, kind: _Kind) -> Tensor:
    def normed(hidden: Tensor) -> Tensor:
        return functional.layer_norm(hidden, (_SIZE,), norm.weight, norm.bias, norm.eps)

    def attended(projected: Tensor) -> Tensor:
        length = len(projected)
        queries, keys, values = projected.view(length, 3, _HEADS, _HEAD_DIM).unbind(1)
        if kind.modern:
            cos, sin = _angles()[:length].cos().unsqueeze(1), _angles()[:length].sin().unsqueeze(1)
            both = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
            queries = rotary_embedding.reference(queries, *both)
            keys = rotary_embedding.reference(keys, *both)
        mask = None
        if kind.window is not None:
            index = torch.arange(length)
            mask = (index.view(-1, 1) - index).abs() <= kind.window
        found = functional.scaled_dot_product_attention(
            queries.transpose(0, 1), keys.transpose(0, 1), values.transpose(0, 1), attn_mask=mask
        )
        return found.transpose(0, 1).flatten(1)

    hidden = modules["words"].weight[token_ids.long()]
    if not kind.modern:
        places = torch.cat([torch.arange(length) for length in _LENGTHS])
        hidden = normed(hidden + modules["positions"].weight[places + 1])
    projected = (normed(hidden) if kind.modern else hidden) @ modules["qkv"].weight.T
    hidden = hidden + torch.cat([*map(attended, projected.split(_LENGTHS))]) @ (
        modules["output"].weight.T
    )
    inner = normed(hidden)
    if not kind.modern:
        hidden = inner
    inner = inner @ modules["up"].weight.T
    if kind.modern:
        activated, values = inner.chunk(2, dim=-1)
        inner = _FUNCTIONS[kind.function](activated) * values
    else:
        inner = _FUNCTIONS[kind.function](inner)
    layer: Tensor = hidden + inner @ modules["down"].weight.T
    return layer
