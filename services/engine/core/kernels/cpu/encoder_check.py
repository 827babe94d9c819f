"""A check of the native encoder, run at every start: as those of self_check.py, short."""

from __future__ import annotations

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

_SIZE, _INNER, _VOCAB = 32, 64, 48
# One that fills no tile, one that fills more than a chunk of keys.
_LENGTHS = (5, 140)


@check("encoders")
def encodes_correctly(library: Library) -> bool:
    """Whether one layer gives what torch gives, for a short sequence and a long one."""
    modules = {
        name: SimpleNamespace(
            weight=known_values(*shape).bfloat16().float() / 4, bias=None, eps=1e-5
        )
        for name, shape in {
            "words": (_VOCAB, _SIZE),
            "qkv": (3 * _SIZE, _SIZE),
            "output": (_SIZE, _SIZE),
            "up": (_INNER, _SIZE),
            "down": (_SIZE, _INNER),
        }.items()
    }
    norm = SimpleNamespace(weight=torch.ones(_SIZE), bias=torch.full((_SIZE,), 0.5), eps=1e-5)
    token_ids = torch.arange(sum(_LENGTHS), dtype=torch.int32) * 5 % _VOCAB
    found = _run(library, modules, norm, token_ids)
    return is_close(found, _reference(modules, norm, token_ids))


def _run(library: Library, modules: dict[str, Any], norm: Any, token_ids: Tensor) -> Tensor:
    builder = EncoderProgramBuilder(
        lambda module: pack_bf16(module.weight),
        lambda module, kind: getattr(module, kind),
        hidden_size=_SIZE,
        heads=1,
    )
    builder.embed(modules["words"])
    builder.norm(norm, replaces=True)
    builder.linear(modules["qkv"], EncoderBuffer.PROJECTED)
    builder.attention()
    builder.activate(EncoderBuffer.ATTENDED)
    builder.linear(modules["output"], EncoderBuffer.HIDDEN, epilogue=Epilogue.ADD)
    builder.norm(norm, replaces=True)
    builder.linear(modules["up"], EncoderBuffer.INNER)
    builder.activate(EncoderBuffer.INNER, "gelu")
    builder.linear(modules["down"], EncoderBuffer.HIDDEN, epilogue=Epilogue.ADD)
    program = EncoderProgram(builder, Team(library, 1))
    num_tokens = len(token_ids)
    starts = torch.tensor([0, _LENGTHS[0], num_tokens], dtype=torch.int32)
    zeros = torch.zeros(num_tokens, dtype=torch.int32)
    hidden = torch.full((num_tokens, _SIZE), float("nan"))
    program.run(
        EncoderInput(
            num_tokens=num_tokens,
            num_sequences=len(_LENGTHS),
            starts=starts.data_ptr(),
            token_ids=token_ids.data_ptr(),
            positions=zeros.data_ptr(),
            types=zeros.data_ptr(),
            hidden=hidden.data_ptr(),
        )
    )
    return hidden


def _reference(modules: dict[str, Any], norm: Any, token_ids: Tensor) -> Tensor:
    def normed(hidden: Tensor) -> Tensor:
        return functional.layer_norm(hidden, (_SIZE,), norm.weight, norm.bias, norm.eps)

    hidden = normed(modules["words"].weight[token_ids.long()])
    projected = (hidden @ modules["qkv"].weight.T).split(_LENGTHS)
    attended = torch.cat(
        [
            functional.softmax(queries @ keys.T * _SIZE**-0.5, dim=-1) @ sequence_values
            for queries, keys, sequence_values in (each.chunk(3, dim=-1) for each in projected)
        ]
    )
    hidden = normed(hidden + attended @ modules["output"].weight.T)
    activated = functional.gelu(hidden @ modules["up"].weight.T)
    layer: Tensor = hidden + activated @ modules["down"].weight.T
    return layer
