"""Native attention and KV write as calls of their own, one operation for a list of layers.

The engine runs them inside the program of a whole step; these calls are for tests and benchmarks.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from services.engine.core.kernels.cpu.kv_cache import KvLayout, PackedKVCache, StepView
from services.engine.core.kernels.cpu.team import Team


class RotaryKvArgs(ctypes.Structure):
    """`struct RotaryKvArgs` of src/rotary_kv.h."""

    _fields_ = (
        ("step", ctypes.POINTER(StepView)),
        ("cache", KvLayout),
        ("qkv", ctypes.c_void_p),
        ("qkv_stride", ctypes.c_int64),
        ("heads", ctypes.c_int32),
        ("query_norm", ctypes.c_void_p),
        ("key_norm", ctypes.c_void_p),
        ("norm_eps", ctypes.c_float),
        ("cos", ctypes.c_void_p),
        ("sin", ctypes.c_void_p),
        ("rotary_dim", ctypes.c_int32),
    )


class AttentionArgs(ctypes.Structure):
    """`struct AttentionArgs` of src/attention.h."""

    _fields_ = (
        ("step", ctypes.POINTER(StepView)),
        ("cache", KvLayout),
        ("queries", ctypes.c_void_p),
        ("query_stride", ctypes.c_int64),
        ("heads", ctypes.c_int32),
        ("window", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("output", ctypes.c_void_p),
        ("output_stride", ctypes.c_int64),
        ("plan", ctypes.c_void_p),
    )


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """The tokens of one step, flattened over its sequences: what all layers share.

    positions [num_tokens] int32, slots [num_tokens] int64, query_starts [num_sequences + 1] int32,
    context_lengths [num_sequences] int32, block_tables [num_sequences, max_blocks] int32.
    """

    positions: Tensor
    slots: Tensor
    query_starts: Tensor
    context_lengths: Tensor
    block_tables: Tensor

    @classmethod
    def of(
        cls, query_lengths: Sequence[int], context_lengths: Sequence[int], tables: Tensor, size: int
    ) -> Step:
        """Lay out a step whose sequences have these lengths in blocks of `size` tokens."""
        positions, slots, starts = [], [], [0]
        for index, (queries, context) in enumerate(
            zip(query_lengths, context_lengths, strict=True)
        ):
            own = torch.arange(context - queries, context)
            positions.append(own)
            slots.append(tables[index].long()[own // size] * size + own % size)
            starts.append(starts[-1] + queries)
        return cls(
            torch.cat(positions).to(torch.int32),
            torch.cat(slots),
            torch.tensor(starts, dtype=torch.int32),
            torch.tensor(list(context_lengths), dtype=torch.int32),
            tables.to(torch.int32).contiguous(),
        )

    def view(self) -> StepView:
        """Return the step as the kernels take it; its addresses live as long as this object."""
        return StepView(
            len(self.positions),
            len(self.context_lengths),
            self.positions.data_ptr(),
            self.slots.data_ptr(),
            self.query_starts.data_ptr(),
            self.context_lengths.data_ptr(),
            self.block_tables.data_ptr(),
            self.block_tables.stride(0),
        )


def rotary_kv(
    team: Team,
    step: Step,
    cache: PackedKVCache,
    layers: Sequence[int],
    qkv: Tensor,
    heads: int,
    cos: Tensor,
    sin: Tensor,
    norms: tuple[Tensor, Tensor, float] | None = None,
) -> None:
    """Rotate the queries and keys of `qkv` in place; write its keys and values to the cache.

    qkv: float32 [num_tokens, (heads + 2 * kv_heads) * head_dim]; cos, sin: float32
    [max_position, rotary_dim / 2]. norms: RMSNorm's weights of each head of queries and of keys,
    float32 [head_dim], and its epsilon; they are normed before they are rotated.
    """
    query_norm, key_norm, eps = norms or (None, None, 0.0)
    view = step.view()
    args = (RotaryKvArgs * len(layers))(
        *(
            RotaryKvArgs(
                ctypes.pointer(view),
                cache.layout(layer),
                qkv.data_ptr(),
                qkv.stride(0),
                heads,
                None if query_norm is None else query_norm.data_ptr(),
                None if key_norm is None else key_norm.data_ptr(),
                eps,
                cos.data_ptr(),
                sin.data_ptr(),
                2 * cos.shape[1],
            )
            for layer in layers
        )
    )
    team.library.table.run_rotary_kv(team.handle, args, len(layers))


def attention(
    team: Team,
    step: Step,
    cache: PackedKVCache,
    layers: Sequence[int],
    queries: Tensor,
    heads: int,
    scale: float,
    output: Tensor,
    window: int | None = None,
    softcap: float | None = None,
) -> None:
    """Attend to the cache's layers, one after the other, all with the same queries.

    queries: float32 [num_tokens, >= heads * head_dim], rows of any stride; output: float32
    [num_tokens, heads * head_dim], which the last layer's result is left in. window, softcap: as
    `paged_attention` takes them.
    """
    view = step.view()
    args = (AttentionArgs * len(layers))(
        *(
            AttentionArgs(
                ctypes.pointer(view),
                cache.layout(layer),
                queries.data_ptr(),
                queries.stride(0),
                heads,
                window or 0,
                scale,
                softcap or 0.0,
                output.data_ptr(),
                output.stride(0),
                None,
            )
            for layer in layers
        )
    )
    team.library.table.run_attention(team.handle, args, len(layers))
