"""The ops that models are made of, each with a plain-torch reference and faster forms beside it."""

from __future__ import annotations

from services.engine.core.kernels.activation import gelu_tanh, gelu_tanh_and_mul, silu_and_mul
from services.engine.core.kernels.attention import (
    AttentionMetadata,
    DeviceLengths,
    paged_attention,
    write_kv,
)
from services.engine.core.kernels.blocks import copy_blocks, swap_blocks
from services.engine.core.kernels.experts import (
    choose_experts,
    grouped_mixture_of_experts,
    mixture_of_experts,
)
from services.engine.core.kernels.kv_layer import KVLayer
from services.engine.core.kernels.linear import (
    grouped_embedding,
    grouped_linear,
    linear,
    scaled_linear,
)
from services.engine.core.kernels.low_rank import (
    AdapterParts,
    AdapterTable,
    LowRankPart,
    SlottedParts,
    add_low_rank,
    add_low_ranks,
    group_by_adapter,
)
from services.engine.core.kernels.matrices import GroupedMatrix, Matrix, ScaledMatrix
from services.engine.core.kernels.normalization import (
    add_rms_norm,
    layer_norm,
    rms_norm,
    rms_norm_of_rows,
)
from services.engine.core.kernels.quantized_rows import (
    Activations,
    RoundedRows,
    add_rms_norm_quantized,
    quantize_rows,
)
from services.engine.core.kernels.registry import OPS, Op, Selection, declare, select
from services.engine.core.kernels.rotary import rotary_angles, rotary_embedding
from services.engine.core.kernels.rotary_kv import rotary_kv

__all__ = [
    "OPS",
    "Activations",
    "AdapterParts",
    "AdapterTable",
    "AttentionMetadata",
    "DeviceLengths",
    "GroupedMatrix",
    "KVLayer",
    "LowRankPart",
    "Matrix",
    "Op",
    "RoundedRows",
    "ScaledMatrix",
    "Selection",
    "SlottedParts",
    "add_low_rank",
    "add_low_ranks",
    "add_rms_norm",
    "add_rms_norm_quantized",
    "choose_experts",
    "copy_blocks",
    "declare",
    "gelu_tanh",
    "gelu_tanh_and_mul",
    "group_by_adapter",
    "grouped_embedding",
    "grouped_linear",
    "grouped_mixture_of_experts",
    "layer_norm",
    "linear",
    "mixture_of_experts",
    "paged_attention",
    "quantize_rows",
    "rms_norm",
    "rms_norm_of_rows",
    "rotary_angles",
    "rotary_embedding",
    "rotary_kv",
    "scaled_linear",
    "select",
    "silu_and_mul",
    "swap_blocks",
    "write_kv",
]
