"""A model whose steps run on the native CPU kernels, from the same checkpoint and model family."""

from __future__ import annotations

import ctypes
import operator
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from services.engine.core.batch import ForwardBatch
from services.engine.core.heap import trim_heap
from services.engine.core.kernels import AdapterParts
from services.engine.core.kernels.cpu.adapter_slots import AdapterSlots
from services.engine.core.kernels.cpu.adapters import NativeAdapter
from services.engine.core.kernels.cpu.kv_cache import (
    KvLayout,
    PackedKVCache,
    check_head_dim,
)
from services.engine.core.kernels.cpu.packing import (
    GroupedWeight,
    PackedLinear,
    pack_bf16,
    pack_grouped,
)
from services.engine.core.kernels.cpu.program import (
    Buffer,
    Packed,
    Program,
    ProgramBuilder,
    StepInput,
    lowering,
)
from services.engine.core.kernels.cpu.sampling import SampleRequest
from services.engine.core.kernels.cpu.team import Team
from services.engine.core.layers import ExpertMatrices
from services.engine.core.model_config import ModelConfig
from services.engine.core.models.base import Model
from services.engine.core.models.precision import MatrixReader, WeightChoice
from services.engine.core.sampler import SampledTokens, SamplingBatch, sample
from services.engine.core.weights.checkpoint import Checkpoint


class NativeModel:
    """Computes steps as `Model` does, in one native call; `bind` gives it its KV cache first."""

    def __init__(
        self,
        model: Model,
        checkpoint: Checkpoint,
        team: Team,
        weights: WeightChoice,
        *,
        max_adapters: int = 0,
        max_adapter_rank: int = 0,
    ) -> None:
        """model: of the family, on the meta device; its checkpoint has been checked.

        Raises UnsupportedModelError where the kernels do not serve its shape.
        """
        self.config: ModelConfig = model.config
        self._team = team
        packer = Packer(model, checkpoint, weights)
        self.rounded: Mapping[str, int] = packer.rounded
        self._builder = lower(model, packer, max_adapter_rank if max_adapters else 0)
        self._adapters = AdapterSlots(self._builder.adapted, max_adapters)
        self._program: Program | None = None

    @property
    def weight_bytes(self) -> dict[str, int]:
        """Bytes of the packed matrices, by their format."""
        return bytes_by_format(self._builder.packed)

    def bind(self, kv_cache: PackedKVCache, *, max_batch_tokens: int) -> None:
        """Take the cache that all steps use. Raises MemoryError where buffers do not fit."""
        config = self.config
        layouts = [kv_cache.layout(index) for index in range(config.num_layers)]
        self._program = Program(
            self._builder,
            self._team,
            heads=config.heads,
            kv_heads=config.kv_heads,
            head_dim=config.head_dim,
            attention_scale=config.scale,
            layers=(KvLayout * config.num_layers)(*layouts),
            num_layers=config.num_layers,
            max_tokens=max_batch_tokens,
        )
        # Untouched pages: a row takes memory once a step wants that many rows.
        self._logits = torch.empty(max_batch_tokens, self._builder.widths[Buffer.LOGITS])
        self._positions = np.empty(max_batch_tokens, np.int32)
        self._query_starts = np.zeros(max_batch_tokens + 1, np.int32)
        self._context_lengths = np.empty(max_batch_tokens, np.int32)
        self._step = StepInput(
            positions=self._positions.ctypes.data,
            query_starts=self._query_starts.ctypes.data,
            context_lengths=self._context_lengths.ctypes.data,
            logits=self._logits.data_ptr(),
        )
        self._tensors: tuple[Tensor | None, ...] = (None,) * 5

    def prepare_adapter(self, parts: AdapterParts) -> NativeAdapter:
        """Pack an adapter, as `Model.prepare_adapter`."""
        return self._adapters.pack(parts)

    def set_adapter(self, slot: int, adapter: NativeAdapter | None) -> None:
        """Keep an adapter, as `Model.set_adapter`."""
        self._adapters.set(slot, adapter)

    def __call__(self, batch: ForwardBatch, kv_cache: Any) -> Tensor:
        """Compute a step, as `Model.__call__`. The logits are overwritten by the next step."""
        self._describe(batch)
        self._step.sampling = None
        self._run()
        return self._wanted_logits

    def sample(self, batch: ForwardBatch, kv_cache: Any, sampling: SamplingBatch) -> SampledTokens:
        """Compute a step and choose a token by each row of its logits, as `sampler.sample`, on all
        threads and in the same native call."""
        if sampling.edits is not None and sampling.edits.has_processors:
            # They read the logits before anything is chosen.
            return sample(self(batch, kv_cache), sampling)
        self._describe(batch)
        request = SampleRequest(self._wanted_logits, sampling)
        self._step.sampling = ctypes.pointer(request.args)
        self._run()
        return request.read()

    def _run(self) -> None:
        assert self._program is not None
        self._program.run(self._step)

    def _describe(self, batch: ForwardBatch) -> None:
        """Tell the kernels where a step's input lies."""
        tensors = (
            batch.token_ids,
            batch.positions,
            batch.slots,
            batch.logits_rows,
            batch.block_tables,
        )
        # Steps of the same shapes nearly always come in the same memory.
        if not all(map(operator.is_, tensors, self._tensors)):
            self._point_to(*tensors)
            self._tensors = tensors
        step = self._step
        step.num_sequences = num_sequences = len(batch.query_lengths)
        self._positions[: step.num_tokens] = self._wide_positions
        np.cumsum(batch.query_lengths, out=self._query_starts[1 : num_sequences + 1])
        self._context_lengths[:num_sequences] = batch.context_lengths
        step.adapters = None if batch.adapters is None else self._adapters.of(batch.adapters)

    def _point_to(
        self,
        token_ids: Tensor,
        positions: Tensor,
        slots: Tensor,
        logits_rows: Tensor,
        block_tables: Tensor,
    ) -> None:
        step = self._step
        step.num_tokens, step.num_rows = len(token_ids), len(logits_rows)
        step.token_ids, step.slots = token_ids.data_ptr(), slots.data_ptr()
        step.logits_rows = logits_rows.data_ptr()
        step.block_tables, step.table_stride = block_tables.data_ptr(), block_tables.stride(-2)
        # One group of layers has no dimension of its own, and needs no stride.
        step.group_slots, step.group_tables = slots.stride(0), block_tables.stride(0)
        self._wide_positions = positions.numpy()
        self._wanted_logits = self._logits[: step.num_rows]


def lower(model: Model, packer: Packer, max_adapter_rank: int = 0) -> ProgramBuilder:
    """Return a model's step on the native kernels; without a largest rank there are no adapters.

    Raises UnsupportedModelError where they do not serve its shape.
    """
    builder = ProgramBuilder(
        packer.pack, packer.read, model.config.max_context_tokens, max_adapter_rank
    )
    with lowering():
        check_head_dim(model.config.head_dim)
        model.lower(builder)
    paths = {id(module): path for path, module in model.named_modules()}
    for layer in builder.adapted:
        layer.path = paths[id(layer.module)]
    return builder


def bytes_by_format(matrices: Iterable[PackedLinear]) -> dict[str, int]:
    """Return what matrices take, by the name of their format."""
    sizes: dict[str, int] = {}
    for packed in matrices:
        name = packed.weight_format.name.lower()
        sizes[name] = sizes.get(name, 0) + packed.num_bytes
    return sizes


class Packer(MatrixReader):
    """Reads a model's matrices from its checkpoint and packs them, one module at a time."""

    def read(self, module: Any, kind: str) -> Tensor:
        # A copy: the checkpoint's own lies in a file that is closed.
        return self._checkpoint.read(f"{self._paths[id(module)]}.{kind}").clone()

    def pack(self, module: Any, gated: bool) -> Packed:
        packed: Packed
        if isinstance(module, ExpertMatrices):
            packed = [_pack(weight, None, gated) for weight in self.choose_each(module)]
        else:
            packed = self._pack(module, gated)
        # What reading and packing took, before the next module takes as much again.
        self._checkpoint.release()
        trim_heap()
        return packed

    def _pack(self, module: Any, gated: bool) -> PackedLinear:
        bias = None
        if getattr(module, "bias", None) is not None:
            names = self._names(module)
            bias = torch.cat([self._checkpoint.read(f"{name}.bias").float() for name in names])
        return _pack(self.choose(module), bias, gated)


def _pack(weight: GroupedWeight | Tensor, bias: Tensor | None, gated: bool) -> PackedLinear:
    if isinstance(weight, GroupedWeight):
        return pack_grouped(weight, bias, gated=gated)
    return pack_bf16(weight, bias, gated=gated)
