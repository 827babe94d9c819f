"""How a model would run on a CPU, and what memory it would take: from its headers alone.

Steps are lowered as they are to run, with matrices that have a shape and a format and no numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from services.engine.core.encoding.loader import OpenedEncoder
from services.engine.core.kernels import ScaledMatrix
from services.engine.core.kernels.cpu.encoder_program import EncoderProgramBuilder
from services.engine.core.kernels.cpu.kv_cache import KvFormat, PackedKVCache
from services.engine.core.kernels.cpu.packing import GroupedWeight, PackedLinear, outline
from services.engine.core.kernels.cpu.packing import quantize_4 as round_to_4
from services.engine.core.kernels.cpu.program import Packed, UnsupportedModelError, lowering
from services.engine.core.kv_cache import KVCache, kv_dtype
from services.engine.core.layer_groups import LayerGroups
from services.engine.core.layers import ExpertMatrices
from services.engine.core.model_config import ModelConfig
from services.engine.core.models.kept import KeptWeights, bytes_by_precision
from services.engine.core.models.loader import OpenedModel
from services.engine.core.models.native import Packer, bytes_by_format, lower
from services.engine.core.models.precision import WeightChoice
from services.engine.core.settings import CoreSettings, KVCacheFormat
from services.engine.core.table_shape import TableShape
from services.engine.core.weights.checkpoint import Checkpoint
from services.engine.core.weights.stored_linear import rounded_outline

_DEFAULTS = CoreSettings(model_path="")
BLOCK_TOKENS, STEP_TOKENS = _DEFAULTS.block_size, _DEFAULTS.max_batch_tokens


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a model takes.

    Attributes:
        native: whether the native kernels of a CPU serve it; else plain torch does.
        reason: why they do not, None where they do.
        weight_bytes: of its weights in memory, by their format.
        dtype: what it computes in; of its KV cache, unless that has eight bits.
    """

    native: bool
    reason: str | None
    weight_bytes: dict[str, int]
    dtype: torch.dtype

    @property
    def total_weight_bytes(self) -> int:
        """Bytes of all weights."""
        return sum(self.weight_bytes.values())


def decoder_footprint(
    opened: OpenedModel,
    weights: KeptWeights,
    *,
    why_not_native: str | None,
    torch_dtype: torch.dtype,
    keeps_few_bits: bool = False,
    multiplies_fp8: bool = True,
) -> Footprint:
    """Return what a decoder would take.

    why_not_native: why the kernels are not to be had here, if they are not. torch_dtype: what
    torch would compute in. keeps_few_bits: whether it would keep matrices in few bits, as it does
    on a GPU. multiplies_fp8: as of `kept.load_kept`. Raises ModelFileError for a quantised
    matrix that cannot be read.
    """
    if weights == "fp8" or weights == "w8a8":
        why_not_native = why_not_native or f"weights in {weights} are for a GPU"
    elif why_not_native is None:
        packer = _OutlinePacker(opened.skeleton, _Outlines(opened.checkpoint), weights)
        try:
            builder = lower(opened.skeleton, packer)
        except UnsupportedModelError as error:
            why_not_native = str(error)
        else:
            return Footprint(True, None, bytes_by_format(builder.packed), torch.bfloat16)
    if keeps_few_bits:
        outline = replace(opened, checkpoint=_Outlines(opened.checkpoint))
        model, _ = outline.load_kept(weights, torch_dtype, "meta", multiplies_fp8=multiplies_fp8)
        return Footprint(False, why_not_native, bytes_by_precision(model), torch_dtype)
    return _on_torch(opened.skeleton, why_not_native, torch_dtype)


def encoder_footprint(
    opened: OpenedEncoder,
    weights: WeightChoice,
    *,
    why_not_native: str | None,
    torch_dtype: torch.dtype,
) -> Footprint:
    """Return what an encoder would take; arguments as of `decoder_footprint`."""
    if why_not_native is None:
        config = opened.skeleton.config

        def pack(module: Any) -> PackedLinear:
            floats = module.weight
            if weights == "int4":
                return outline(round_to_4(floats))
            return outline(rounded_outline(tuple(floats.shape)) if weights == "int8" else floats)

        try:
            with lowering():
                builder = EncoderProgramBuilder(
                    pack, getattr, hidden_size=config.hidden_size, heads=config.heads
                )
                opened.skeleton.lower(builder)
        except UnsupportedModelError as error:
            why_not_native = str(error)
        else:
            sizes = bytes_by_format(builder.packed) | {"embeddings": builder.table_bytes}
            return Footprint(True, None, sizes, torch.bfloat16)
    return _on_torch(opened.skeleton, why_not_native, torch_dtype)


def _on_torch(skeleton: torch.nn.Module, reason: str, dtype: torch.dtype) -> Footprint:
    elements = sum(parameter.numel() for parameter in skeleton.parameters())
    name = str(dtype).removeprefix("torch.")
    return Footprint(False, reason, {name: elements * dtype.itemsize}, dtype)


def kv_cache_bytes(
    config: ModelConfig,
    footprint: Footprint,
    *,
    sequences: int,
    tokens: int,
    kv_format: KVCacheFormat = "auto",
) -> int:
    """Bytes of the KV cache for so many sequences of so many tokens, which share nothing.

    Where layers have windows, it is what they take while their prompts are computed in steps as
    long as the settings' default has them.
    """
    groups = LayerGroups.of(config)
    shape = TableShape.of_steps(BLOCK_TOKENS, groups.windows, STEP_TOKENS)
    sizes = (groups.layers_per_block, BLOCK_TOKENS, config.kv_heads, config.head_dim)
    if footprint.native:
        packed = KvFormat.INT8 if kv_format == "int8" else KvFormat.BF16
        block_bytes = PackedKVCache.bytes_per_block(*sizes, packed)
    else:
        block_bytes = KVCache.bytes_per_block(*sizes, kv_dtype(kv_format, footprint.dtype))
    return sequences * shape.blocks_for(tokens) * block_bytes


class _OutlinePacker(Packer):
    """Packs nothing: matrices keep their shape and get their format."""

    def pack(self, module: Any, gated: bool) -> Packed:
        if isinstance(module, ExpertMatrices):
            return [outline(each, gated=gated) for each in self.choose_each(module)]
        return outline(self.choose(module), gated=gated)

    def round(self, floats: Tensor) -> GroupedWeight:
        return rounded_outline((floats.shape[0], floats.shape[1]))


class _Outlines:
    """A checkpoint whose tensors are on the meta device; see `checkpoint.Checkpoint`."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self.path, self.shapes, self.unknown = (
            checkpoint.path,
            checkpoint.shapes,
            checkpoint.unknown,
        )

    @property
    def num_bytes(self) -> int:
        return self._checkpoint.num_bytes

    @property
    def is_quantised(self) -> bool:
        return self._checkpoint.is_quantised

    def read(self, name: str) -> Tensor:
        return torch.empty(self.shapes[name], device="meta")

    def read_grouped(self, name: str) -> GroupedWeight | None:
        found = self._checkpoint.outline(name)
        # The scales of one matrix at a time.
        self._checkpoint.release()
        return found

    def read_scaled(self, name: str, device: torch.device) -> ScaledMatrix | None:
        return self._checkpoint.read_scaled(name, torch.device("meta"))

    def outline(self, name: str) -> GroupedWeight | None:
        return self._checkpoint.outline(name)

    def stored_as(self, name: str) -> str:
        return self._checkpoint.stored_as(name)

    def stored_bytes(self, name: str) -> int:
        return self._checkpoint.stored_bytes(name)

    def source_name(self, name: str) -> str:
        return self._checkpoint.source_name(name)

    def release(self) -> None:
        self._checkpoint.release()

    def close(self) -> None:
        self._checkpoint.close()
