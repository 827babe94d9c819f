"""An encoder whose batches run on the native CPU kernels, from the same checkpoint and family."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from services.engine.core.encoding.batch import EncoderBatch
from services.engine.core.encoding.model import Encoder
from services.engine.core.kernels.cpu.encoder_program import (
    EncoderInput,
    EncoderProgram,
    EncoderProgramBuilder,
)
from services.engine.core.kernels.cpu.packing import (
    PackedLinear,
    pack_bf16,
    pack_grouped,
    quantize_4,
    quantize_8,
)
from services.engine.core.kernels.cpu.program import lowering
from services.engine.core.kernels.cpu.team import Team
from services.engine.core.layers import MergedLinear
from services.engine.core.weights.checkpoint import Checkpoint

# "auto" is bfloat16.
WeightChoice: TypeAlias = Literal["auto", "bfloat16", "int8", "int4"]


class NativeEncoder:
    """Computes batches as `Encoder` does, in one native call."""

    def __init__(
        self, model: Encoder, checkpoint: Checkpoint, team: Team, weights: WeightChoice
    ) -> None:
        """model: of the family, on the meta device; its checkpoint has been checked.

        Raises UnsupportedModelError where the kernels do not serve its shape, MemoryError where
        its buffers do not fit.
        """
        config = model.config
        packer = _Packer(model, checkpoint, weights)
        self._hidden_size = config.hidden_size
        self._token_types = config.token_types
        with lowering():
            self._builder = EncoderProgramBuilder(
                packer.pack, packer.read, hidden_size=config.hidden_size, heads=config.heads
            )
            model.lower(self._builder)
        self._program = EncoderProgram(self._builder, team)

    @property
    def weight_bytes(self) -> dict[str, int]:
        """Bytes of the packed matrices, by their format, and of the embeddings."""
        sizes: dict[str, int] = {}
        for packed in self._builder.packed:
            name = packed.weight_format.name.lower()
            sizes[name] = sizes.get(name, 0) + packed.num_bytes
        return {**sizes, "embeddings": self._builder.table_bytes}

    def __call__(self, batch: EncoderBatch) -> Tensor:
        """The vectors of all tokens, float32 [num_tokens, hidden_size]."""
        num_tokens = len(batch.token_ids)
        hidden = torch.empty(num_tokens, self._hidden_size)
        starts = np.zeros(len(batch.lengths) + 1, np.int32)
        np.cumsum(batch.lengths, out=starts[1:])
        token_ids = batch.token_ids.numpy().astype(np.int32)
        positions = batch.positions.numpy().astype(np.int32)
        types = self._types(batch)
        self._program.run(
            EncoderInput(
                num_tokens=num_tokens,
                num_sequences=len(batch.lengths),
                starts=starts.ctypes.data,
                token_ids=token_ids.ctypes.data,
                positions=positions.ctypes.data,
                types=types.ctypes.data,
                hidden=hidden.data_ptr(),
            )
        )
        return hidden

    def _types(self, batch: EncoderBatch) -> npt.NDArray[np.int32]:
        if self._token_types < 2:
            return np.zeros(len(batch.token_ids), np.int32)
        return batch.token_types.numpy().astype(np.int32)


class _Packer:
    """Reads a model's matrices from its checkpoint and packs them, one module at a time."""

    def __init__(self, model: Encoder, checkpoint: Checkpoint, weights: WeightChoice) -> None:
        self._checkpoint = checkpoint
        self._weights = weights
        self._paths = {id(module): path for path, module in model.named_modules()}

    def read(self, module: Any, kind: str) -> Tensor | None:
        if getattr(module, kind) is None:
            return None
        path = self._paths[id(module)]
        names = [path]
        if isinstance(module, MergedLinear):
            parent = path.rpartition(".")[0]
            names = [f"{parent}.{part}" for part in module.sizes]
        return torch.cat([self._checkpoint.read(f"{name}.{kind}") for name in names])

    def pack(self, module: Any) -> PackedLinear:
        weight, bias = self.read(module, "weight"), self.read(module, "bias")
        assert weight is not None
        if self._weights == "int8":
            return pack_grouped(quantize_8(weight), bias)
        if self._weights == "int4":
            return pack_grouped(quantize_4(weight), bias)
        return pack_bf16(weight, bias)
