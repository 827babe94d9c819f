"""An encoder as a program of the native kernels: built once, run in one call for each batch."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from services.engine.core.kernels.cpu.packing import LinearWeights, PackedLinear, WeightFormat
from services.engine.core.kernels.cpu.program import Epilogue
from services.engine.core.kernels.cpu.team import Team

# Floats that the kernels take at a time.
LANES = 16


class EncoderBuffer(IntEnum):
    """Where operations read and write rows, `enum class EncoderBuffer` of src/encoder.h."""

    HIDDEN = 0
    PROJECTED = 1
    ATTENDED = 2
    INNER = 3


class EncoderOpKind(IntEnum):
    """What an operation does, `enum class EncoderOpKind` of src/encoder.h."""

    EMBED = 0
    NORM = 1
    ACTIVATE = 2
    LINEAR = 3
    ROTARY = 4
    ATTENTION = 5


# `enum class ActivationFunction` of src/encoder.h, by the names of HF's configurations.
ACTIVATION_FUNCTIONS = {
    "linear": 0,
    "gelu": 1,
    "gelu_new": 2,
    "gelu_pytorch_tanh": 2,
    "gelu_fast": 2,
    "relu": 3,
    "silu": 4,
    "tanh": 5,
}


class EncoderOp(ctypes.Structure):
    """`struct EncoderOp` of src/encoder.h."""

    _fields_ = (
        ("kind", ctypes.c_int32),
        ("source", ctypes.c_int32),
        ("target", ctypes.c_int32),
        ("epilogue", ctypes.c_int32),
        ("format", ctypes.c_int32),
        ("function", ctypes.c_int32),
        ("gated", ctypes.c_int32),
        ("replaces", ctypes.c_int32),
        ("converts", ctypes.c_int32),
        ("width", ctypes.c_int32),
        ("window", ctypes.c_int32),
        ("eps", ctypes.c_float),
        ("scale", ctypes.c_void_p),
        ("shift", ctypes.c_void_p),
        ("cos", ctypes.c_void_p),
        ("sin", ctypes.c_void_p),
        ("weights", ctypes.POINTER(LinearWeights)),
    )


class EmbeddingTables(ctypes.Structure):
    """`struct EmbeddingTables` of src/encoder.h."""

    _fields_ = (
        ("words", ctypes.c_void_p),
        ("positions", ctypes.c_void_p),
        ("types", ctypes.c_void_p),
        ("first_position", ctypes.c_int32),
    )


class EncoderSpec(ctypes.Structure):
    """`struct EncoderSpec` of src/encoder.h."""

    _fields_ = (
        ("ops", ctypes.POINTER(EncoderOp)),
        ("num_ops", ctypes.c_int32),
        ("tables", EmbeddingTables),
        ("hidden_size", ctypes.c_int32),
        ("heads", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("attention_scale", ctypes.c_float),
        ("widths", ctypes.c_int32 * len(EncoderBuffer)),
        ("max_activation_inputs", ctypes.c_int32),
    )


class EncoderInput(ctypes.Structure):
    """`struct EncoderInput` of src/encoder.h."""

    _fields_ = (
        ("num_tokens", ctypes.c_int32),
        ("num_sequences", ctypes.c_int32),
        ("starts", ctypes.c_void_p),
        ("token_ids", ctypes.c_void_p),
        ("positions", ctypes.c_void_p),
        ("types", ctypes.c_void_p),
        ("hidden", ctypes.c_void_p),
    )


class EncoderProgramBuilder:
    """Collects an encoder's operations in order; a family's `lower` calls its methods.

    `pack(module)` gives the packed weights of a linear layer, `read(module, kind)` its "weight" or
    "bias", or an embedding's or a norm's, None where it has none.
    """

    def __init__(
        self,
        pack: Callable[[Any], PackedLinear],
        read: Callable[[Any, str], Tensor | None],
        *,
        hidden_size: int,
        heads: int,
    ) -> None:
        if hidden_size % LANES or hidden_size // heads % LANES:
            raise ValueError(
                f"the kernels take {LANES} numbers at a time, and heads of {hidden_size // heads} "
                "are no multiple"
            )
        self.hidden_size, self.heads = hidden_size, heads
        self.ops: list[EncoderOp] = []
        self.widths = [0] * len(EncoderBuffer)
        self.widths[EncoderBuffer.HIDDEN] = self.widths[EncoderBuffer.ATTENDED] = hidden_size
        # Norms that replace nothing write a row here.
        self.widths[EncoderBuffer.INNER] = hidden_size
        self.max_activation_inputs = 0
        self.tables = EmbeddingTables()
        self.packed: list[PackedLinear] = []
        self._kept: list[Tensor] = []  # what operations point to
        self._written: dict[EncoderBuffer, int] = {}  # width of the rows that were written last
        self._pack, self._read = pack, read

    @property
    def table_bytes(self) -> int:
        """Bytes of the embeddings."""
        return sum(table.nbytes for table in self._kept if table.dtype == torch.bfloat16)

    def embed(
        self, word: Any, position: Any = None, token_type: Any = None, first_position: int = 0
    ) -> None:
        """hidden = the sum of the embeddings of tokens, positions and token types."""
        self.tables = EmbeddingTables(
            *(self._table(module) for module in (word, position, token_type)), first_position
        )
        self._add(EncoderOpKind.EMBED)

    def norm(self, norm: Any, *, replaces: bool) -> None:
        """The input of the next linear layer = LayerNorm(hidden), which may replace hidden."""
        self._add(
            EncoderOpKind.NORM,
            width=self.hidden_size,
            replaces=replaces,
            eps=norm.eps,
            scale=self._vector(norm, "weight"),
            shift=self._vector(norm, "bias"),
        )

    def activate(
        self, source: EncoderBuffer, function: str = "linear", *, gated: bool = False
    ) -> None:
        """The input of the next linear layer = the rows of `source`, activated.

        gated: the first half of a row is, and multiplies the second.
        """
        width = self._written.get(source, self.hidden_size) // (2 if gated else 1)
        if width % LANES:
            raise ValueError(f"the kernels take {LANES} numbers at a time, not {width}")
        self._add(
            EncoderOpKind.ACTIVATE,
            source=source,
            width=width,
            function=ACTIVATION_FUNCTIONS[function],
            gated=gated,
        )

    def convert(self) -> None:
        """The input of the next linear layer = hidden as it is."""
        self.activate(EncoderBuffer.HIDDEN)

    def linear(
        self, module: Any, target: EncoderBuffer, *, epilogue: Epilogue = Epilogue.STORE
    ) -> None:
        """target = what was normed or activated last, times the weights of `module`."""
        packed = self._pack(module)
        self.packed.append(packed)
        writer = self.ops[-1]
        assert writer.kind in (EncoderOpKind.NORM, EncoderOpKind.ACTIVATE)
        assert writer.width == packed.inputs
        writer.converts = 1
        writer.format = int(packed.weight_format is not WeightFormat.BF16)
        self.max_activation_inputs = max(self.max_activation_inputs, packed.inputs)
        self.widths[target] = max(self.widths[target], packed.outputs)
        self._written[target] = packed.outputs
        self._add(
            EncoderOpKind.LINEAR,
            target=target,
            epilogue=epilogue,
            format=writer.format,
            width=packed.inputs,
        )
        self.ops[-1].weights = ctypes.pointer(packed.struct)

    def rotary(self, cos: Tensor, sin: Tensor) -> None:
        """Rotate queries and keys; cos, sin: float32 [max_positions, head_dim / 2]."""
        self._kept += [cos, sin]
        self._add(EncoderOpKind.ROTARY, cos=cos.data_ptr(), sin=sin.data_ptr())

    def attention(self, window: int | None = None) -> None:
        """attended = attention of the queries in `projected`, within `window` tokens if given."""
        self._add(EncoderOpKind.ATTENTION, window=-1 if window is None else window)

    def _table(self, module: Any) -> int | None:
        weight = None if module is None else self._read(module, "weight")
        if weight is None:
            return None
        self._kept.append(weight.to(torch.bfloat16).contiguous())
        return self._kept[-1].data_ptr()

    def _vector(self, module: Any, kind: str) -> int | None:
        vector = self._read(module, kind)
        if vector is None:
            return None
        self._kept.append(vector.float().contiguous())
        return self._kept[-1].data_ptr()

    def _add(self, kind: EncoderOpKind, **fields: Any) -> None:
        plain = {
            name: int(value) if isinstance(value, IntEnum | bool) else value
            for name, value in fields.items()
        }
        self.ops.append(EncoderOp(kind=int(kind), **plain))


class EncoderProgram:
    """A program ready to run. Raises MemoryError where its buffers do not fit."""

    def __init__(self, builder: EncoderProgramBuilder, team: Team) -> None:
        self._builder, self._team = builder, team  # what the kernels point to
        self._ops = (EncoderOp * len(builder.ops))(*builder.ops)
        head_dim = builder.hidden_size // builder.heads
        spec = EncoderSpec(
            ops=self._ops,
            num_ops=len(self._ops),
            tables=builder.tables,
            hidden_size=builder.hidden_size,
            heads=builder.heads,
            head_dim=head_dim,
            attention_scale=head_dim**-0.5,
            widths=(ctypes.c_int32 * len(EncoderBuffer))(*builder.widths),
            max_activation_inputs=builder.max_activation_inputs,
        )
        table = team.library.table
        self._run, self._free = table.run_encoder, table.free_encoder
        self._handle = table.make_encoder(team.handle, ctypes.byref(spec))
        if not self._handle:
            raise MemoryError("the buffers of an encoder do not fit")

    def run(self, batch: EncoderInput) -> None:
        """Compute one batch. Raises MemoryError where it takes more than there is."""
        if self._run(self._handle, ctypes.byref(batch)):
            raise MemoryError("a batch takes more memory than there is")

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self._free(self._handle)
