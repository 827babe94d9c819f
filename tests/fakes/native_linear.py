"""One native linear layer, or a few, as a program of their own: rows go in as an embedding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from services.engine.core.kernels.cpu.kv_cache import KvLayout
from services.engine.core.kernels.cpu.library import Library
from services.engine.core.kernels.cpu.packing import (
    GROUP_INPUTS,
    GroupedWeight,
    PackedLinear,
    pack_bf16,
    pack_grouped,
)
from services.engine.core.kernels.cpu.program import (
    Buffer,
    Epilogue,
    Program,
    ProgramBuilder,
    StepInput,
)
from services.engine.core.kernels.cpu.team import Team

ROUNDING = 2.0**-24  # of one operation on floats, at most


class Norm:
    """What a program asks of a norm."""

    def __init__(self, weight: Tensor, eps: float, bias: Tensor | None = None) -> None:
        self.weight, self.eps, self.bias = weight, eps, bias


def run(
    kernels: Library,
    rows: GroupedWeight | PackedLinear,
    weights: PackedLinear | None,
    *,
    norm: Norm | None = None,
    epilogue: Epilogue = Epilogue.STORE,
    onto: Tensor | None = None,
    cap: float = 0.0,
    token_ids: Sequence[int] | None = None,
    threads: int = 2,
) -> Tensor:
    """Return weights x rows, float32 [tokens, outputs]; the rows themselves without weights.

    rows: float values that no rounding to bf16 keeps, [num_rows, inputs]; `token_ids` chooses some
    of them, all by default. onto: what the output holds before, for an epilogue that adds to it.
    """
    table = rows if isinstance(rows, PackedLinear) else pack_grouped(rows)
    ids = torch.arange(table.outputs) if token_ids is None else torch.tensor(token_ids)
    builder = ProgramBuilder(lambda module, gated: module, getattr)
    builder.embed(table)
    if norm is None:
        builder.convert(Buffer.RESIDUAL)
    else:
        builder.norm(norm)
    if weights is None:
        weights = identity(table.inputs)
    builder.linear(weights, Buffer.LOGITS, epilogue=epilogue, cap=cap)
    width = builder.widths[Buffer.LOGITS]
    # What a kernel leaves out shows, and so does what it writes beside its own rows.
    guarded = torch.full((len(ids) + 2, width), float("nan"))
    if onto is not None:
        guarded[1:-1] = onto
    starts = torch.zeros(1, dtype=torch.int32)
    program = Program(
        builder,
        Team(kernels, threads),
        heads=1,
        kv_heads=1,
        head_dim=16,
        attention_scale=1.0,
        layers=(KvLayout * 1)(KvLayout(None, None, 0, 16, 1, 16, 0)),
        num_layers=1,
        max_tokens=len(ids),
    )
    step = StepInput(
        num_tokens=len(ids),
        num_sequences=0,
        query_starts=starts.data_ptr(),
        token_ids=ids.data_ptr(),
        logits=guarded[1:].data_ptr(),
    )
    program.run(step)
    assert guarded[0].isnan().all()
    assert guarded[-1].isnan().all()
    return guarded[1:-1]


def identity(size: int) -> PackedLinear:
    """The matrix that changes nothing but what is rounded on the way into it."""
    return pack_bf16(torch.eye(size))


def random_grouped(
    outputs: int, inputs: int, *, bits: int = 8, minima: bool = True, seed: int = 0
) -> GroupedWeight:
    """A quantised matrix with every level there is, its values about as large as 1."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> Tensor:
        shape = (outputs, inputs // GROUP_INPUTS)
        return (low + (high - low) * torch.rand(shape, generator=generator)).half()

    levels = torch.randint(0, 1 << bits, (outputs, inputs), generator=generator).to(torch.uint8)
    scales = uniform(-1.5, 1.5) / (1 << (bits - 1))
    return GroupedWeight(levels, scales, uniform(-2, 2) if minima else None, bits)


@dataclass(frozen=True)
class Matrix:
    """A matrix in one of the kernels' formats, and its values."""

    pack: Callable[..., PackedLinear]
    values: Tensor
    magnitudes: Tensor  # of what is added up: with minima, more than those of the values

    @classmethod
    def random(cls, weight_format: str, outputs: int, inputs: int, seed: int) -> Matrix:
        if weight_format == "bf16":
            floats = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))
            values = floats.bfloat16().double()
            return cls(lambda **how: pack_bf16(floats, **how), values, values.abs())
        bits, minima = (4 if weight_format == "q4" else 8), weight_format != "q8"
        grouped = random_grouped(outputs, inputs, bits=bits, minima=minima, seed=seed)
        values = grouped.dequantize().double()
        magnitudes = values.abs()
        if grouped.minima is not None:
            each = grouped.minima.double().abs().repeat_interleave(GROUP_INPUTS, dim=1)
            magnitudes = magnitudes + 2 * each
        return cls(lambda **how: pack_grouped(grouped, **how), values, magnitudes)


def activations(kernels: Library, weight_format: str, rows: Tensor) -> Tensor:
    """What the kernels multiply instead of the rows: bf16, int8 in groups of 32, or the rows."""
    if weight_format != "bf16":
        groups = rows.view(len(rows), -1, GROUP_INPUTS)
        largest = groups.abs().amax(-1, keepdim=True)
        # A true division: `127 / largest` multiplies by a reciprocal, which rounds twice.
        inverse = torch.where(largest > 0, torch.tensor(127.0) / largest, torch.zeros(()))
        levels = (groups * inverse).round()  # half to even
        return (levels.double() * (largest / 127).double()).view(rows.shape)
    return (rows.bfloat16() if kernels.isa in ("amx", "avx512bf16") else rows).double()


def sums(
    kernels: Library, weight_format: str, rows: Tensor, matrix: Matrix, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """The layer's sums in float64, and how far off float additions in any order may be."""
    inputs = activations(kernels, weight_format, rows)
    bound = (rows.shape[1] + 8) * ROUNDING * (inputs.abs() @ matrix.magnitudes.T + bias.abs())
    return inputs @ matrix.values.T + bias, bound
