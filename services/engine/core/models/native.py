"""A model whose steps run on the native CPU kernels, from the same checkpoint and model family."""

from __future__ import annotations

import ctypes
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, TypeAlias

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
    concatenate,
    pack_bf16,
    pack_grouped,
    quantize_4,
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
from services.engine.core.layers import Embedding, ExpertMatrices, MergedLinear
from services.engine.core.model_config import ModelConfig
from services.engine.core.models.base import Model
from services.engine.core.sampler import SampledTokens, SamplingBatch, sample
from services.engine.core.weights.checkpoint import Checkpoint
from services.engine.core.weights.stored_linear import rounded

# "auto": quantised matrices in their own precision, or in 8 bits where they cannot be, a quantised
# model's head in 8 bits at most, all others in bf16.
WeightChoice: TypeAlias = Literal["auto", "bfloat16", "int8", "int4"]


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
        # Matrices by what they are stored as, of those that `auto` rounds to 8 bits.
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


class Packer:
    """Reads a model's matrices from its checkpoint and packs them, one module at a time."""

    def __init__(self, model: Model, checkpoint: Checkpoint, weights: WeightChoice) -> None:
        self._checkpoint = checkpoint
        self._weights = weights
        self.rounded: Counter[str] = Counter()
        self._logits = "embedding" if model.config.tie_embeddings else "head"
        self._paths = {id(module): path for path, module in model.named_modules()}

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

    def choose(self, module: Any) -> GroupedWeight | Tensor:
        """Return a module's matrix as it is to be kept."""
        names, path = self._names(module), self._paths[id(module)]
        if path.endswith(".router"):
            # It is small, and an error in it sends tokens elsewhere.
            return self._floats(names)
        grouped = self._grouped(names, is_head=isinstance(module, Embedding) or path == "head")
        return self._floats(names) if grouped is None else grouped

    def choose_each(self, matrices: ExpertMatrices) -> Iterator[GroupedWeight | Tensor]:
        """Return the matrix of one expert after the other as it is to be kept."""
        path, count = self._paths[id(matrices.experts)], matrices.experts.count
        if f"{path}.{matrices.parts[0]}.weight" not in self._checkpoint.shapes:
            for index in range(count):
                names = [f"{path}.{index}.{part}" for part in matrices.parts]
                grouped = self._grouped(names, is_head=False)
                yield self._floats(names) if grouped is None else grouped
            return
        # The experts' matrices of a part are stored as one stack.
        names = [f"{path}.{part}" for part in matrices.parts]
        stacks = [None if self._weights == "bfloat16" else self._read_grouped(n) for n in names]
        floats: list[Tensor] = []  # read where something is to be rounded
        for index in range(count):

            def values(index: int = index) -> Tensor:
                if not floats:
                    floats.extend(self._checkpoint.read(f"{name}.weight") for name in names)
                parts = [part[index] for part in floats]
                return parts[0] if len(parts) == 1 else torch.cat(parts)

            parts = [_of_expert(stack, index, count) for stack in stacks]
            grouped = self._kept(parts, values, is_head=False)
            yield values() if grouped is None else grouped

    def _names(self, module: Any) -> list[str]:
        path = self._paths[id(module)]
        if isinstance(module, MergedLinear) and f"{path}.weight" not in self._checkpoint.shapes:
            parent = path.rpartition(".")[0]
            return [f"{parent}.{part}" for part in module.sizes]
        return [path]

    def _floats(self, names: list[str]) -> Tensor:
        parts = [self._checkpoint.read(f"{name}.weight") for name in names]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _grouped(self, names: list[str], *, is_head: bool) -> GroupedWeight | None:
        if self._weights == "bfloat16":
            return None
        parts = [self._read_grouped(name) for name in names]
        return self._kept(parts, lambda: self._floats(names), is_head=is_head)

    def _kept(
        self,
        parts: list[GroupedWeight | None],
        floats: Callable[[], Tensor],
        *,
        is_head: bool,
    ) -> GroupedWeight | None:
        stored = [part for part in parts if part is not None]
        own = concatenate(stored) if len(stored) == len(parts) else None
        if self._weights in ("auto", "bfloat16"):
            return own
        if self._weights == "int4" and not is_head:
            return own if own is not None and own.bits == 4 else quantize_4(floats())
        # A head stays at eight bits: logits show every error in it.
        if own is not None and own.minima is None:
            return own
        return self.round(floats())

    def round(self, floats: Tensor) -> GroupedWeight:
        """Return a matrix of floats rounded to 8 bits."""
        return rounded(lambda rows: floats[rows], (floats.shape[0], floats.shape[1]))

    def _read_grouped(self, name: str) -> GroupedWeight | None:
        weight = self._checkpoint.read_grouped(f"{name}.weight")
        if weight is None and name == self._logits and self._checkpoint.is_quantised:
            # Every step reads all of it: in 16 bits it can take longer than all layers together.
            weight = self.round(self._checkpoint.read(f"{name}.weight"))
        if weight is not None and weight.is_rounded:
            self.rounded[self._checkpoint.stored_as(f"{name}.weight")] += 1
        return weight


def _pack(weight: GroupedWeight | Tensor, bias: Tensor | None, gated: bool) -> PackedLinear:
    if isinstance(weight, GroupedWeight):
        return pack_grouped(weight, bias, gated=gated)
    return pack_bf16(weight, bias, gated=gated)


def _of_expert(stack: GroupedWeight | None, index: int, count: int) -> GroupedWeight | None:
    """One of `count` matrices that lie one after the other."""
    if stack is None:
        return None
    each = stack.shape[0] // count
    return stack.map(lambda rows: rows[index * each : (index + 1) * each])
